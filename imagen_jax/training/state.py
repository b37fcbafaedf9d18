"""Everything that a training step reads and writes."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from imagen_jax.compilation import compiler_options
from imagen_jax.config import StageConfig
from imagen_jax.models import network
from imagen_jax.sharding import state_shardings
from imagen_jax.training.bad_updates import Guard
from imagen_jax.training.optimizer import make_optimizer


@flax.struct.dataclass
class TrainState:
    """State of a run, sharded over the mesh."""

    step: jax.Array  # scalar int32, steps done, those with skipped updates included
    params: Any  # float32
    ema: Any  # their exponential moving average: what is sampled
    opt_state: optax.OptState
    guard: Guard  # which updates were skipped

    @property
    def updates(self) -> jax.Array:
        """Scalar int32, steps whose update was done."""
        return self.step - self.guard.skipped


def _fresh(cfg: StageConfig, params: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy of its own: both are donated to the step.
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(cfg.optimizer, cfg.training.steps).init(params),
        guard=Guard(),
    )


@functools.cache
def _boxed_state(cfg: StageConfig) -> TrainState:
    return jax.eval_shape(functools.partial(_fresh, cfg), network.abstract_params(cfg))


@functools.cache
def abstract_state(cfg: StageConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state; computes nothing."""
    boxed = _boxed_state(cfg)
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        nn.unbox(boxed),
        state_shardings(boxed, mesh),
    )


def create_state(cfg: StageConfig, mesh: Mesh) -> TrainState:
    """A fresh state, made where it lives; the same values on any mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))

    def init(key):
        return nn.unbox(_fresh(cfg, network.init(cfg, key)))

    options = compiler_options(mesh, cfg.model.dtype, once=True)
    run = jax.jit(init, out_shardings=shardings, compiler_options=options)
    return run(jax.random.key(cfg.training.seed))
