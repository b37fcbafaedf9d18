"""The optimizer of a config."""

import jax
import jax.numpy as jnp
import optax

from imagen_jax.config import OptimizerConfig
from imagen_jax.training.bad_updates import select


def learning_rate(cfg: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to 0 (or the peak, for ever).

    The paper prints an end value of 2500000 (App. F), plainly a slip; ours is 0.
    """
    if cfg.decay_steps:
        return optax.warmup_cosine_decay_schedule(
            0.0, cfg.learning_rate, cfg.warmup_steps, cfg.decay_steps
        )
    if not cfg.warmup_steps:
        # A warm-up of no steps never leaves 0 in optax.
        return optax.constant_schedule(cfg.learning_rate)
    return optax.schedules.warmup_constant_schedule(
        0.0, cfg.learning_rate, cfg.warmup_steps
    )


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, then Adam or Adafactor (paper App. F).

    Its `update(gradients, state, params, gradient_norm=norm, skip=skip)` takes the norm
    of all gradients, so what it makes of an array depends on no other. Where the bool
    scalar `skip` holds it leaves the state as it is, to the bit; the updates then are
    of no use.
    """
    rate = learning_rate(cfg)
    rule = {
        "adam": lambda: optax.chain(
            _adam(cfg), _skipping(optax.scale_by_learning_rate(rate))
        ),
        "adafactor": lambda: _adafactor(cfg, rate),
    }[cfg.name]()
    return optax.chain(_clip(cfg.clip_norm), rule)


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, given the norm; all 0 in a step that is skipped."""

    def update(gradients, state, params=None, *, gradient_norm, skip, **_):
        over = gradient_norm >= limit
        norm, to = (jnp.where(over, v, 1.0) for v in (gradient_norm, limit))
        return jax.tree.map(
            lambda g: jnp.where(skip, 0.0, g / norm * to), gradients
        ), state

    return optax.GradientTransformationExtraArgs(optax.identity().init, update)


def _skipping(
    rule: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    def update(gradients, state, params=None, *, skip, **_):
        updates, new = rule.update(gradients, state, params)
        return updates, select(skip, state, new)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _adafactor(
    cfg: OptimizerConfig, rate: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """`optax.adafactor`, whose averages are kept by a decay of 1 and a gradient of 0.

    To select each of them takes a compiler for TPUs longer (benchmarks/README.md).
    """

    def rule(skip):
        # The decay is 1 - (count - offset + 1) ** -rate, and 2 ** -1000 is 0.
        return optax.adafactor(
            rate,
            multiply_by_parameter_scale=cfg.parameter_scale,
            decay_rate=jnp.where(skip, 1000.0, 0.8),
            decay_offset=jnp.where(skip, -1, 0),
        )

    def update(gradients, state, params=None, *, skip, **_):
        updates, new = rule(skip).update(gradients, state, params)

        def kept(old, new):
            return jnp.where(skip, old, new) if new.ndim == 0 else new

        return updates, jax.tree.map(kept, state, new)

    return optax.GradientTransformationExtraArgs(rule(False).init, update)


def _adam(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose updates are of the moments that are kept.

    So the old moments are read once and XLA writes the new ones in their place; of
    the moments before the selection it would copy all of them (benchmarks/README.md).
    """
    rule = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)

    def update(gradients, state, params=None, *, skip, **_):
        state = select(skip, state, rule.update(gradients, state)[1])
        means = optax.tree.bias_correction(state.mu, cfg.b1, state.count)
        squares = optax.tree.bias_correction(state.nu, cfg.b2, state.count)
        updates = jax.tree.map(
            lambda mean, square: mean / (jnp.sqrt(square) + cfg.eps), means, squares
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(rule.init, update)
