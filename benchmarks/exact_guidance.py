"""Guidance and thresholding with a denoiser that is exact: what is no network's fault.

python benchmarks/exact_guidance.py [--pictures=2000]

Skies over seas as in hues.py, each of one colour, and Gaussian: a mixture of twelve
hues whose chroma, angle and brightness vary as much as those that hues.py draws. Its
mean given a noised picture has a closed form, with the asked hue and without.
"""

import argparse
import dataclasses

import hues
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.batch import Cond
from imagen_jax.config import DiffusionConfig, SamplerConfig
from imagen_jax.diffusion.gaussian import expand
from imagen_jax.diffusion.sampler import sample

WEIGHTS = (3.0, 10.0, 30.0, 100.0)
STEPS = (64, 256, 1000)
# Of hues.py's even distributions: chroma 0.25 to 0.6, within 8 degrees, brightness 0.3.
CHROMA = 0.425
DEVIATIONS = np.array([0.35, 2 * CHROMA * np.deg2rad(8), 0.6 * 3**0.5]) / 12**0.5


def axes() -> np.ndarray:
    """`[12, 3, 3]`: along each hue, across it, and along the greys."""
    angles = np.deg2rad(30 * np.arange(12))
    along = np.stack([np.cos(angles), np.sin(angles)], 1) @ hues.ACROSS
    across = np.stack([-np.sin(angles), np.cos(angles)], 1) @ hues.ACROSS
    return np.stack([along, across, np.full((12, 3), 3**-0.5)], 1)


def denoise(z: jax.Array, logsnr: jax.Array, cond: Cond) -> jax.Array:
    """E[x0 | z], `[B, 2, 1, 3]`; text is one row of twelve for sky and for sea."""
    basis, variance = jnp.asarray(axes(), z.dtype), jnp.asarray(DEVIATIONS**2, z.dtype)
    mean = jnp.array([CHROMA, 0, 0], z.dtype)
    alpha, sigma2 = (
        expand(a, z[..., None])
        for a in (jnp.sqrt(jax.nn.sigmoid(logsnr)), jax.nn.sigmoid(-logsnr))
    )
    off = jnp.einsum("bhwc,kdc->bhwkd", z, basis) - alpha * mean
    total = alpha**2 * variance + sigma2
    guess = jnp.einsum("bhwkd,kdc->bhwkc", mean + alpha * variance / total * off, basis)
    posterior = jax.nn.softmax(-0.5 * jnp.sum(off**2 / total, -1))
    asked = cond.text[:, :, None].astype(z.dtype)
    weights = jnp.where(expand(cond.mask.any(1), z), asked, posterior)
    return jnp.einsum("bhwk,bhwkc->bhwc", weights, guess)


def main():
    """Prints a row for each number of steps, weight and kind of thresholding."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=2000)
    count = parser.parse_args().pictures
    asked = np.random.default_rng(0).integers(12, size=(count, 2))
    captions = [f"a {hues.HUES[a]} sky over a {hues.HUES[b]} sea" for a, b in asked]
    cond = Cond(text=jax.nn.one_hot(asked, 12), mask=jnp.ones((count, 2), bool))
    keys = jax.random.split(jax.random.key(0), count)
    diffusion = DiffusionConfig(prediction="x0")
    print("| steps | w | threshold | right | as drawn |\n|---|---|---|---|---|")
    for steps in STEPS:
        for weight in WEIGHTS:
            # Of six values the percentile is the largest.
            config = SamplerConfig(steps=steps, guidance=weight, percentile=100.0)
            for kind in ("none", "static", "dynamic"):
                own = dataclasses.replace(config, threshold=kind)
                run = jax.jit(
                    lambda keys, cond, own=own: sample(
                        denoise, keys, cond, (2, 1, 3), diffusion, own
                    )[0]
                )
                made = 127.5 * (np.clip(run(keys, cond), -1, 1) + 1)
                made = np.repeat(made, 2, 1)
                right = hues.right(made, captions).all(1).mean()
                kept = hues.as_drawn(made).all(1).mean()
                row = f"| {steps} | {weight:g} | {kind} | {right:.0%} | {kept:.0%} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
