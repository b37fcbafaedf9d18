"""One training step: where the network meets the mathematics."""

import functools
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from imagen_jax.batch import Batch, batch_spec, check_batch
from imagen_jax.compilation import compiler_options
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.loss import (
    NoisedBatch,
    loss_by_logsnr,
    losses,
    noise_batch,
)
from imagen_jax.models import network
from imagen_jax.sharding import batch_sharding, on_mesh, on_rows, replicated
from imagen_jax.training.bad_updates import judge
from imagen_jax.training.optimizer import learning_rate, make_optimizer
from imagen_jax.training.state import TrainState, abstract_state

Metrics = dict[str, Any]


def ema_decay(step: jax.Array, decay: float) -> jax.Array:
    """`min(decay, (1 + step) / (10 + step))`: early averages forget the start.

    Source: tf.train.ExponentialMovingAverage with `num_updates`.
    """
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def train_step(
    state: TrainState, batch: Batch, *, cfg: StageConfig
) -> tuple[TrainState, Metrics]:
    """Loss, gradient, update and average, for a global batch.

    When `bad_updates.judge` finds the numbers bad, parameters, average and optimizer
    state stay as they are (an average of -0.0 becomes 0.0); only the step counts on, so
    that the next one draws other noise. Once the budget of skipped updates is spent,
    the step counter stands still as well.

    Returns:
      The state after the step, and metrics: scalars, and "loss_by_logsnr" as
      `diffusion.loss` makes it. "skipped" and "budget_spent" are bool, of this step;
      "skipped_updates" is int32, since the start of the run; the others are float32.
    """
    check_batch(batch, batch_spec(cfg))
    noised, key_dropout = draw(state.step, batch, cfg)
    each, gradients = loss_and_gradients(state.params, noised, key_dropout, cfg)
    loss, gradient_norm = each.mean(), optax.tree.norm(gradients)
    skip, guard = judge(state.guard, loss, gradient_norm, cfg.training)

    steps = cfg.training.steps
    rate = learning_rate(cfg.optimizer, steps)
    optimizer = make_optimizer(cfg.optimizer, steps)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    opt_state = optax.tree.where(skip, state.opt_state, opt_state)
    # Selected before the average is taken, XLA updates both in place.
    params = optax.apply_updates(state.params, updates)
    params = optax.tree.where(skip, state.params, params)
    decay = jnp.where(skip, 1, ema_decay(state.updates, cfg.optimizer.ema_decay))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    metrics = {
        "loss": loss,
        "loss_by_logsnr": loss_by_logsnr(each, noised.logsnr),
        "gradient_norm": gradient_norm,
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(rate(state.updates)),
        "skipped": skip,
        "skipped_updates": guard.skipped,
        "budget_spent": guard.spent,
    }
    state = TrainState(
        step=state.step + jnp.where(state.guard.spent, 0, 1),
        params=params,
        ema=ema,
        opt_state=opt_state,
        guard=guard,
    )
    return state, metrics


def draw(
    step: jax.Array, batch: Batch, cfg: StageConfig
) -> tuple[NoisedBatch, jax.Array | None]:
    """Everything random in the step after `step`: noised batch and dropout key."""
    key = jax.random.fold_in(jax.random.key(cfg.training.seed), step)
    key_noise, key_dropout = jax.random.split(key)
    noised = noise_batch(batch, key_noise, cfg)
    return noised, key_dropout if cfg.model.dropout else None


def loss_and_gradients(
    params: Any, noised: NoisedBatch, key: jax.Array | None, cfg: StageConfig
) -> tuple[jax.Array, Any]:
    """Each example's loss `[B]`, and the gradient of their mean loss."""

    def mean_loss(params, noised, key):
        denoise = functools.partial(network.apply, cfg.model, params, dropout_key=key)
        each = losses(denoise, noised)
        return each.mean(), each

    gradient = jax.grad(mean_loss, has_aux=True)
    parts = cfg.training.microbatches
    if parts == 1:
        found, each = gradient(params, noised, key)
        return each, found

    def add(total, part):
        number, noised = part
        own = None if key is None else jax.random.fold_in(key, number)
        found, each = gradient(params, noised, own)
        return jax.tree.map(lambda t, f: t + f / parts, total, found), each

    found, each = jax.lax.scan(
        add,
        jax.tree.map(jnp.zeros_like, params),
        (jnp.arange(parts), deal(noised, parts)),
    )
    return each.swapaxes(0, 1).reshape(-1), found


def deal(noised: NoisedBatch, parts: int) -> NoisedBatch:
    """Splits `[B, ...]` arrays into microbatches `[parts, B / parts, ...]`.

    A microbatch has every parts-th row, so that rows stay on the device they are on.
    """
    return jax.tree.map(
        lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), noised
    )


def compile_train_step(
    cfg: StageConfig, mesh: Mesh, meanwhile: Callable[[], None] = lambda: None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step of `jit_train_step`, compiled.

    `meanwhile` is called while XLA compiles in a thread of its own. An error of it is
    raised at once; the process ends when XLA is done.
    """
    step = jit_train_step(cfg, mesh)
    lowered = step.lower(abstract_state(cfg, mesh), on_rows(batch_spec(cfg), mesh))
    compiled = futures.ThreadPoolExecutor(1).submit(lowered.compile)
    meanwhile()
    compiled.result()
    # Calls find it in JAX's memory. What `compile` returns would refuse a batch of
    # another shape in its own words, not in ours.
    return step


def jit_train_step(cfg: StageConfig, mesh: Mesh) -> Callable:
    """The jitted step: state donated, batch and state placed on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    return jax.jit(
        on_mesh(functools.partial(train_step, cfg=cfg), mesh),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, cfg.model.dtype),
    )
