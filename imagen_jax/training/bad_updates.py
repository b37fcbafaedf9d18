"""Updates that are skipped because their numbers are bad; decided on the devices."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from imagen_jax.config import TrainingConfig

# Span of the running averages by which spikes are recognised.
AVERAGED_STEPS = 100
# How many updates make up for a skipped one.
_REDEEMED_BY = 10


def _zero(dtype) -> jax.Array:
    return flax.struct.field(default_factory=lambda: jnp.zeros((), dtype))


@flax.struct.dataclass
class Guard:
    """A run's memory of its updates; scalars, replicated, at first all zero."""

    skipped: jax.Array = _zero(jnp.int32)  # updates skipped since the start of the run
    # Grows by 10 with a skipped update and falls by 1 with another, down to 0.
    debt: jax.Array = _zero(jnp.int32)
    # Whether the debt has reached the budget; the state then stands still.
    spent: jax.Array = _zero(jnp.bool_)
    averaged: jax.Array = _zero(jnp.int32)  # updates in the averages
    loss: jax.Array = _zero(jnp.float32)  # its running average
    gradient_norm: jax.Array = _zero(jnp.float32)  # its running average


def judge(
    guard: Guard, loss: jax.Array, gradient_norm: jax.Array, cfg: TrainingConfig
) -> tuple[jax.Array, Guard]:
    """Whether to skip the update of a step, and the guard after the step.

    An update is skipped when the loss or the gradient norm (before clipping) is not
    finite or a spike, and always once the budget is spent; then the guard no longer
    changes.
    """
    skip = ~(jnp.isfinite(loss) & jnp.isfinite(gradient_norm))
    if cfg.spike_factor:
        spike = (loss > cfg.spike_factor * guard.loss) | (
            gradient_norm > cfg.spike_factor * guard.gradient_norm
        )
        skip |= spike & (guard.averaged >= AVERAGED_STEPS)

    # A plain mean at first, so that it needs no start value.
    weight = 1.0 / jnp.minimum(guard.averaged + 1, AVERAGED_STEPS)
    norm = guard.gradient_norm
    done = guard.replace(
        debt=jnp.maximum(guard.debt - 1, 0),
        averaged=guard.averaged + 1,
        loss=guard.loss + weight * (loss - guard.loss),
        gradient_norm=norm + weight * (gradient_norm - norm),
    )
    debt = guard.debt + _REDEEMED_BY
    budget = _REDEEMED_BY * cfg.skip_budget_steps
    not_done = guard.replace(
        skipped=guard.skipped + 1,
        debt=debt,
        spent=(debt >= budget) if budget else guard.spent,
    )
    where = optax.tree.where
    return skip | guard.spent, where(guard.spent, guard, where(skip, not_done, done))


def before_the_last_skip(guard: Guard) -> Guard:
    """The guard before the step that spent the budget."""
    return guard.replace(
        skipped=guard.skipped - 1,
        debt=guard.debt - _REDEEMED_BY,
        spent=guard.spent & False,
    )


def after_rollback(guard: Guard, lost: jax.Array) -> Guard:
    """A checkpoint's guard, for a run that goes on from it `lost` steps later."""
    return guard.replace(skipped=guard.skipped + lost, debt=guard.debt * 0)
