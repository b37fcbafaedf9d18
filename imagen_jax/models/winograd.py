"""Convolutions of 3 x 3 with two thirds of the products, in one dimension.

Winograd's F(2, 3) (Lavin and Gray, arXiv 1509.09308): two neighbouring outputs of three
taps are sums of four products, not six. The other dimension is convolved as usual, so
there is little to transform.
"""

import jax
import jax.numpy as jnp
from jax import lax


def inputs(x: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The four inputs of each pair of outputs along `axis`: B^T x.

    Args:
      x: pictures with one more pixel on each side.
      axis: of even length.
    """
    stop = x.shape[axis] - 3
    a, b, c, d = (
        lax.slice_in_dim(x, i, i + stop, stride=2, axis=axis) for i in range(4)
    )
    return a - c, b + c, c - b, b - d


def kernels(kernel: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The four kernels of one tap along `axis` for one of three: G g."""
    a, b, c = jnp.split(kernel, 3, axis)
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def outputs(products: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """The pairs of outputs along `axis` of the four products: A^T m."""
    a, b, c, d = products
    even, odd = a + b + c, b - c - d
    return _spaced(even, axis, 0, 1) + _spaced(odd, axis, 1, 0)


def outputs_back(out: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The transpose of `outputs`, of `out` with one more pixel on each side."""
    stop = out.shape[axis] - 3
    even, odd = (
        lax.slice_in_dim(out, i, i + stop, stride=2, axis=axis) for i in (1, 2)
    )
    return even, even + odd, even - odd, -odd


def kernels_back(found: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """The transpose of `kernels`."""
    a, b, c, d = found
    half = (b + c) / 2
    return jnp.concatenate([a + half, (b - c) / 2, half + d], axis)


def _spaced(x, axis, before, behind):
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (before, behind, 1)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)
