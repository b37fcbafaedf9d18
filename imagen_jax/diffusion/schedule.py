"""Noise schedules: log-SNR as a function of continuous time.

Time runs from 0 (data) to 1 (noise). Every schedule preserves variance, so the log-SNR
determines it: `alpha**2 = sigmoid(logsnr)`, `sigma**2 = sigmoid(-logsnr)`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from imagen_jax.config import DiffusionConfig, SamplerConfig


def logsnr_schedule(t: jax.Array, cfg: DiffusionConfig) -> jax.Array:
    """Log-SNR `log(alpha**2 / sigma**2)` at times `t` in [0, 1], of any shape.

    It falls from `cfg.logsnr_max` to `cfg.logsnr_min` ("linear" ends at -10.05 if the
    clip is lower).
    """
    schedule = {"cosine": _cosine, "linear": _linear}[cfg.schedule]
    return schedule(t, cfg.logsnr_min, cfg.logsnr_max)


def _cosine(t, lowest, highest):
    """`alpha = cos(pi t / 2)`, with its ends squeezed to the clip.

    Source: improved DDPM (arXiv 2102.09672) Eq. 17, continuous and without its offset
    (arXiv 2202.00512 App. A).
    """
    at_0 = math.atan(math.exp(-highest / 2))
    at_1 = math.atan(math.exp(lowest / 2))
    span = math.pi / 2 - at_0 - at_1
    # Each half is computed from its own end, because tan loses digits near pi / 2.
    return jnp.where(
        t < 0.5,
        -2 * jnp.log(jnp.tan(at_0 + span * t)),
        2 * jnp.log(jnp.tan(at_1 + span * (1 - t))),
    )


def _linear(t, lowest, highest):
    """DDPM's linear beta from 1e-4 to 0.02 in 1000 steps, made continuous.

    `-log(alpha**2)` is the integral of `1000 * beta`: `0.1 t + 9.95 t**2`.
    Source: paper F.3; arXiv 2006.11239 Sec. 4.
    """
    integral = 0.1 * t + 9.95 * t**2
    # Keeps the logarithm and its gradient finite at t = 0.
    tiny = jnp.maximum(integral, math.exp(-highest) / 2)
    return jnp.clip(-jnp.log(jnp.expm1(tiny)), lowest, highest)


def sampling_logsnr(diffusion: DiffusionConfig, sampler: SamplerConfig) -> jax.Array:
    """`[steps + 1]` rising log-SNRs: one for each call of the network, and the end.

    The network is told the log-SNR and not the time, so it may be sampled along another
    schedule or grid than it was trained with, within the levels that it has seen.
    """
    trained = sampler.schedule == "trained"
    cfg = dataclasses.replace(
        diffusion,
        schedule=diffusion.schedule if trained else sampler.schedule,
        logsnr_min=max(diffusion.logsnr_min, sampler.logsnr_min),
        logsnr_max=min(diffusion.logsnr_max, sampler.logsnr_max),
    )
    if sampler.grid == "logsnr":
        first, last = logsnr_schedule(jnp.array([1.0, 0.0]), cfg)
        return jnp.linspace(first, last, sampler.steps + 1)
    # Evenly spaced times (paper Sec. 2.4).
    return logsnr_schedule(jnp.linspace(1.0, 0.0, sampler.steps + 1), cfg)
