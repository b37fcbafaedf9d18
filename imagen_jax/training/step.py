"""One training step: where the network meets the mathematics."""

import functools
from collections.abc import Callable
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
from imagen_jax.sharding import batch_sharding, on_mesh, replicated
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
    """Loss, gradient, update and average.

    Args:
      state: before the step.
      batch: `[B]` examples; B is the global batch.
      cfg: the stage.

    Returns:
      The state after the step, and float32 metrics: scalars, and "loss_by_logsnr"
      as `diffusion.loss` makes it.
    """
    check_batch(batch, batch_spec(cfg))
    key = jax.random.fold_in(jax.random.key(cfg.training.seed), state.step)
    key_noise, key_dropout = jax.random.split(key)
    if not cfg.model.dropout:
        key_dropout = None

    noised = noise_batch(batch, key_noise, cfg)
    each, gradients = _gradients(state.params, noised, key_dropout, cfg)
    updates, opt_state = make_optimizer(cfg.optimizer).update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, cfg.optimizer.ema_decay)
    metrics = {
        "loss": each.mean(),
        "loss_by_logsnr": loss_by_logsnr(each, noised.logsnr),
        "gradient_norm": optax.tree.norm(gradients),
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(learning_rate(cfg.optimizer)(state.step)),
    }
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema=optax.incremental_update(params, state.ema, 1 - decay),
        opt_state=opt_state,
    )
    return state, metrics


def _gradients(
    params: Any, noised: NoisedBatch, key: jax.Array | None, cfg: StageConfig
) -> tuple[jax.Array, Any]:
    """Each example's loss `[B]`, and the gradient of their mean."""

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

    # Every parts-th row, so that each device keeps the rows that it has.
    dealt = jax.tree.map(
        lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), noised
    )
    found, each = jax.lax.scan(
        add, jax.tree.map(jnp.zeros_like, params), (jnp.arange(parts), dealt)
    )
    return each.swapaxes(0, 1).reshape(-1), found


def compile_train_step(
    cfg: StageConfig, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: state donated, batch and state placed on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    return jax.jit(
        on_mesh(functools.partial(train_step, cfg=cfg), mesh),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(
            mesh, dtype=cfg.model.dtype, size=cfg.train_size
        ),
    )
