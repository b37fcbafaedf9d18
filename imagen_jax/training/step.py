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
from imagen_jax.diffusion.loss import loss, loss_by_logsnr
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

    def mean_loss(params):
        denoise = functools.partial(
            network.apply, cfg.model, params, dropout_key=key_dropout
        )
        losses, noised = loss(denoise, batch, key_noise, cfg)
        return losses.mean(), loss_by_logsnr(losses, noised.logsnr)

    (value, by_logsnr), gradients = jax.value_and_grad(mean_loss, has_aux=True)(
        state.params
    )
    updates, opt_state = make_optimizer(cfg.optimizer).update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, cfg.optimizer.ema_decay)
    metrics = {
        "loss": value,
        "loss_by_logsnr": by_logsnr,
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
        compiler_options=compiler_options(mesh, dtype=cfg.model.dtype),
    )
