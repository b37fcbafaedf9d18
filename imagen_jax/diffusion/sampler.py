"""Samplers: step functions under one `lax.scan`."""

import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import DiffusionConfig, SamplerConfig
from imagen_jax.diffusion import gaussian
from imagen_jax.diffusion.guidance import guided_x0, threshold
from imagen_jax.diffusion.loss import Denoiser
from imagen_jax.diffusion.schedule import logsnr_schedule, uniform_times


def sample(
    denoise: Denoiser,
    keys: jax.Array,
    cond: Cond,
    shape: tuple[int, int, int],
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
) -> jax.Array:
    """Draws one picture per key.

    All the noise of a picture comes from its own key: it is the same alone, in any
    batch and on any mesh.

    Args:
      denoise: `(z [B, H, W, C], logsnr [B], cond) -> [B, H, W, C]`.
      keys: `[B]` typed PRNG keys.
      cond: conditioning of `[B]` pictures.
      shape: `(H, W, C)` of one picture.
      diffusion: schedule and prediction.
      sampler: steps, "ddpm" or "ddim", gamma, guidance, thresholding.

    Returns:
      `[B, H, W, C]` float32, in [-1, 1] unless thresholding is "none".
    """

    def normal(step):
        # Step 0 is the initial noise; step i + 1 belongs to scan step i.
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(own)

    logsnr = logsnr_schedule(uniform_times(sampler.steps), diffusion)

    def body(z, step):
        logsnr_t, logsnr_s = logsnr[step], logsnr[step + 1]
        x0 = guided_x0(
            denoise,
            z,
            jnp.broadcast_to(logsnr_t, keys.shape),
            cond,
            diffusion.prediction,
            sampler.guidance,
        )
        x0 = threshold(x0, sampler.threshold, sampler.percentile)
        if sampler.name == "ddim":
            z = gaussian.ddim_step(x0, z, logsnr_t, logsnr_s)
        else:
            mean, deviation = gaussian.ancestral_step(
                x0, z, logsnr_t, logsnr_s, sampler.gamma
            )
            z = mean + deviation * normal(step + 1)
        return z, x0

    def keep_last(carry, step):
        z, x0 = body(carry[0], step)
        return (z, x0), None

    z = normal(0)
    (_, x0), _ = jax.lax.scan(
        keep_last, (z, jnp.zeros_like(z)), jnp.arange(sampler.steps)
    )
    # The last estimate rather than the last z: no noise is added to the result.
    return x0
