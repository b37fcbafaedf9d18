"""Classifier-free guidance, and the thresholds that keep its result in range."""

import math

import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.diffusion.gaussian import expand, predicted_x0
from imagen_jax.diffusion.loss import Denoiser


def guided_x0(
    denoise: Denoiser,
    z: jax.Array,
    logsnr: jax.Array,
    cond: Cond,
    prediction: str,
    weight: jax.Array | None,
    batched: bool = True,
) -> jax.Array:
    """The guided estimate of x0 (paper Eq. 2).

    `weight * conditional + (1 - weight) * unconditional`. Guiding eps, x0 or v is
    equivalent, because for a given `z` each is affine in the others. The guided ODE
    does not sample `p(x | text)**weight p(x)**(1 - weight)` (docs/diffusion.md).

    Args:
      denoise, z, logsnr, cond: the network and its inputs; the unconditional pass nulls
        only the text.
      prediction: "eps", "x0" or "v".
      weight: `[B]`, w of Eq. 2; None is no guidance (w = 1) and runs the network once.
      batched: whether both passes are one call on twice the batch, or two calls in
        sequence, with half of the activations at a time.
    """
    if weight is None:
        return predicted_x0(denoise(z, logsnr, cond), z, logsnr, prediction)
    text, mask = jax.tree.map(jnp.zeros_like, (cond.text, cond.mask))
    null = cond.replace(text=text, mask=mask)
    if batched:
        # Interleaved, so that both rows of an image lie on the same device.
        z_twice, logsnr_twice, both = jax.tree.map(
            lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]),
            (z, logsnr, cond),
            (z, logsnr, null),
        )
        output = denoise(z_twice, logsnr_twice, both)
        conditional, unconditional = output[0::2], output[1::2]
    else:
        conditional = denoise(z, logsnr, cond)
        # Without the barrier the compiler may run both at once.
        z, conditional = jax.lax.optimization_barrier((z, conditional))
        unconditional = denoise(z, logsnr, null)
    w = expand(weight, z)
    output = w * conditional + (1 - w) * unconditional
    return predicted_x0(output, z, logsnr, prediction)


def threshold(x0: jax.Array, kind: str, percentile: float) -> jax.Array:
    """Brings each image, independently, back towards [-1, 1] (paper Sec. 2.3).

    "static" clips. "dynamic" (Fig. A.31) takes as s the given percentile of the image's
    `|x0|`, at least 1, clips to [-s, s] and divides by s. "none" changes nothing.
    """
    if kind == "none":
        return x0
    if kind == "static":
        return jnp.clip(x0, -1.0, 1.0)
    s = percentile_of_size(x0, percentile)
    s = expand(jnp.maximum(s, 1.0), x0)
    return jnp.clip(x0, -s, s) / s


def percentile_of_size(x: jax.Array, percentile: float) -> jax.Array:
    """The percentile of float32 `|x|` of each row `[B]`, linear between ranks as numpy.

    Exact, without a sort: floats that are not negative have the order of their bits, so
    the value at a rank is found by counting, two bits at a time from the highest. Each
    pass reads the row once, and devices that share a row exchange only counts.
    """
    rows = jnp.abs(x.reshape(len(x), -1))
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    place = percentile / 100 * (rows.shape[1] - 1)
    rank = math.floor(place)

    def two_bits(i, found):
        shift = (30 - 2 * i).astype(jnp.uint32)
        # The value is no less than a candidate that at most `rank` values lie below.
        digit = sum(
            (jnp.sum(bits < (found | (jnp.uint32(d) << shift))[:, None], 1) <= rank)
            for d in (1, 2, 3)
        )
        return found | (digit.astype(jnp.uint32) << shift)

    start = jnp.zeros(len(x), jnp.uint32)
    found = jax.lax.fori_loop(0, 16, two_bits, start)
    value = jax.lax.bitcast_convert_type(found, x.dtype)
    # The next rank holds the same value again, or the smallest one above.
    above = jnp.where(bits > found[:, None], rows, jnp.inf).min(1)
    repeated = jnp.sum(bits <= found[:, None], 1) > rank + 1
    above = jnp.where(repeated | (above == jnp.inf), value, above)
    return value + (place - rank) * (above - value)
