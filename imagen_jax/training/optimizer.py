"""The optimizer: clipping, then Adam or Adafactor (paper App. F)."""

import jax
import optax

from imagen_jax.config import OptimizerConfig


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to 0, or the peak for good.

    `steps` is the training's last step. One that ends within the warm-up only rises.
    The paper prints an end value of 2500000 (App. F), plainly a slip; ours is 0.
    """
    decay_steps = cfg.decay_steps or steps
    if decay_steps > cfg.warmup_steps:
        return optax.warmup_cosine_decay_schedule(
            0.0, cfg.learning_rate, cfg.warmup_steps, decay_steps
        )
    if not cfg.warmup_steps:
        # A warm-up of no steps never leaves 0 in optax.
        return optax.constant_schedule(cfg.learning_rate)
    return optax.schedules.warmup_constant_schedule(
        0.0, cfg.learning_rate, cfg.warmup_steps
    )


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global gradient norm, then the rule `cfg.name`."""
    rate = learning_rate(cfg, steps)
    rule = {
        "adam": lambda: optax.adam(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        "adafactor": lambda: _with_placeholders(
            optax.adafactor(rate, multiply_by_parameter_scale=cfg.parameter_scale)
        ),
    }[cfg.name]()
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), rule)


def _with_placeholders(
    adafactor: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """`optax.adafactor` that returns its placeholders as they are, without copies.

    They are zeros of shape `(1,)` in place of the moments that a parameter does not
    need: the factored ones or the full one.
    """

    def update(gradients, state, params):
        updates, (moments, *others) = adafactor.update(gradients, state, params)

        def older(old, new, param):
            # A parameter of that shape has a full moment.
            return old if new.shape == (1,) != param.shape else new

        kept = {
            name: jax.tree.map(
                older, getattr(state[0], name), getattr(moments, name), params
            )
            for name in ("v_row", "v_col", "v")
        }
        return updates, (moments._replace(**kept), *others)

    return optax.GradientTransformation(adafactor.init, update)
