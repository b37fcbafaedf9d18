"""Samplers: DDPM, DDIM and DPM-Solver++ as steps of one `lax.scan`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.batch import Cond, to_uint8
from imagen_jax.config import DiffusionConfig, SamplerConfig
from imagen_jax.diffusion import gaussian
from imagen_jax.diffusion.guidance import guided_x0, threshold
from imagen_jax.diffusion.loss import Denoiser
from imagen_jax.diffusion.schedule import sampling_logsnr
from imagen_jax.errors import UserError


class Moment(NamedTuple):
    """What a sampler makes its next `z` of."""

    z: jax.Array  # [B, H, W, C], as the images below
    x0: jax.Array  # the estimate at this step, guided and thresholded
    x0_before: jax.Array  # that of the step before; zeros at the first one
    # Log-SNR of the step before (at the first one its own), of this one, of the next.
    levels: tuple[jax.Array, jax.Array, jax.Array]
    noise: Callable[[], jax.Array]  # draws this step's standard normal noise


def _ddpm(now: Moment, sampler: SamplerConfig) -> jax.Array:
    levels = now.levels[1:]
    mean, deviation = gaussian.ancestral_step(now.x0, now.z, *levels, sampler.gamma)
    return mean + deviation * now.noise()


# The next `z`, by `SamplerConfig.name`; one of your own is "own:NAME"
# (docs/extending.md).
STEPS = {
    "ddpm": _ddpm,
    "ddim": lambda now, _: gaussian.ddim_step(now.x0, now.z, *now.levels[1:]),
    "dpmpp": lambda now, _: gaussian.dpmpp_step(
        now.x0, now.x0_before, now.z, *now.levels
    ),
}


def guidance_weights(sampler: SamplerConfig) -> np.ndarray:
    """`[steps]` weights w of the paper's Eq. 2, the noisiest step first."""
    return np.array(
        sampler.guidance_schedule or [sampler.guidance] * sampler.steps, np.float32
    )


def sample(
    denoise: Denoiser,
    keys: jax.Array,
    cond: Cond,
    shape: tuple[int, int, int],
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    weights: jax.Array,
    recorded_steps: Sequence[int] = (),
    on_step: Callable[[jax.Array, jax.Array], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one image per key.

    All noise of an image comes from its own key, so the image is the same alone, in any
    batch and on any mesh.

    Args:
      keys: `[B]` typed PRNG keys.
      shape: `(H, W, C)` of one image.
      diffusion, sampler: how the network was trained, and how it is sampled.
      weights: `[steps, B]`, w of Eq. 2 for each image. Those of the sampler only say at
        which steps no image is guided: where they are 1.
      recorded_steps: K steps, from 0, whose estimates of x0 are returned too.
      on_step: called on the host, after each step, with its number and its estimate
        of x0, `[B, H, W, C]` uint8.

    Returns:
      `[B, H, W, C]` float32, in [-1, 1] unless thresholding is "none", and
      `[K, B, H, W, C]`, the recorded estimates.
    """

    def normal(step):
        # Step 0 is the initial noise; step i + 1 belongs to scan step i.
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(own)

    if sampler.name not in STEPS:
        raise UserError(
            f"the sampler {sampler.name!r} is not in diffusion.sampler.STEPS: run the "
            "code that puts it there first (docs/extending.md)"
        )
    logsnr = sampling_logsnr(diffusion, sampler)
    guided = guidance_weights(sampler) != 1
    # Where each step's estimate is kept; those not recorded overwrite the last place.
    kept = len(recorded_steps)
    places = np.full(sampler.steps, kept)
    places[list(recorded_steps)] = range(kept)

    def estimate(z, step):
        def run(weight):
            return guided_x0(
                denoise,
                z,
                jnp.broadcast_to(logsnr[step], keys.shape),
                cond,
                diffusion.prediction,
                weight,
                sampler.guidance_batched,
            )

        if guided.all():
            x0 = run(weights[step])
        elif not guided.any():
            x0 = run(None)
        else:
            is_guided = jnp.asarray(guided)[step]
            x0 = jax.lax.cond(is_guided, lambda: run(weights[step]), lambda: run(None))
        return threshold(x0, sampler.threshold, sampler.percentile)

    def body(carry, step):
        z, x0_before, recorded = carry
        x0 = estimate(z, step)
        before = logsnr[jnp.maximum(step - 1, 0)]
        levels = before, logsnr[step], logsnr[step + 1]
        now = Moment(z, x0, x0_before, levels, lambda: normal(step + 1))
        z = STEPS[sampler.name](now, sampler)
        if kept:
            recorded = recorded.at[jnp.asarray(places)[step]].set(x0)
        if on_step:
            jax.debug.callback(on_step, step, to_uint8(x0))
        return (z, x0, recorded), None

    z = normal(0)
    recorded = jnp.zeros((kept + 1 if kept else 0, *z.shape))
    (_, x0, recorded), _ = jax.lax.scan(
        body, (z, jnp.zeros_like(z), recorded), jnp.arange(sampler.steps)
    )
    # The last estimate rather than the last z, which may have noise added.
    return x0, recorded[:kept]
