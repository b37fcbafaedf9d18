"""Classifier-free guidance, and keeping the guided picture in range."""

import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond, null_text
from imagen_jax.diffusion.gaussian import predicted_x0
from imagen_jax.diffusion.loss import Denoiser


def guided_x0(
    denoise: Denoiser,
    z: jax.Array,
    logsnr: jax.Array,
    cond: Cond,
    prediction: str,
    weight: float,
) -> jax.Array:
    """The guided estimate of x0 (paper Eq. 2).

    `weight * conditional + (1 - weight) * unconditional`; 1 is no guidance and runs
    the network once, anything else runs it once on twice the batch. Guiding eps, x0
    or v is the same thing: each is affine in the others with `z` shared.

    Args:
      denoise: the network.
      z: `[B, H, W, 3]`.
      logsnr: `[B]`.
      cond: with the captions; only the text is nulled for the second half.
      prediction: what the network answers: "eps", "x0" or "v".
      weight: w of Eq. 2.
    """
    if weight == 1.0:
        return predicted_x0(denoise(z, logsnr, cond), z, logsnr, prediction)
    text, mask = null_text(cond.text, cond.mask)
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), cond, cond.replace(text=text, mask=mask)
    )
    output = denoise(jnp.concatenate([z, z]), jnp.concatenate([logsnr, logsnr]), both)
    conditional, unconditional = jnp.split(output, 2)
    output = weight * conditional + (1 - weight) * unconditional
    return predicted_x0(output, z, logsnr, prediction)


def threshold(x0: jax.Array, kind: str, percentile: float) -> jax.Array:
    """Brings each picture back towards [-1, 1], by itself (paper Sec. 2.3).

    "static" clips. "dynamic" (Fig. A.31) takes s, the given percentile of the
    picture's own `|x0|` but at least 1, clips to [-s, s] and divides by s.

    Args:
      x0: `[B, H, W, 3]`.
      kind: "none", "static" or "dynamic".
      percentile: in (0, 100].
    """
    if kind == "none":
        return x0
    if kind == "static":
        return jnp.clip(x0, -1.0, 1.0)
    axes = tuple(range(1, x0.ndim))
    s = jnp.percentile(jnp.abs(x0), percentile, axis=axes, keepdims=True)
    s = jnp.maximum(s, 1.0)
    return jnp.clip(x0, -s, s) / s
