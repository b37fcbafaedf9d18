"""Convolutions of 3 x 3 with half of the products, or a quarter.

Winograd's F(4, 3) (Lavin and Gray, arXiv 1509.09308, section 4.3): four neighbouring
outputs of three taps are sums of six products, not twelve. With one dimension taken so
and the other convolved as usual there is little to transform; with both there are no
taps left, and all is products of matrices.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Outputs that are computed at once.
TILE = 4
# The paper's B^T, G and A^T.
INPUTS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNELS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUTS = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def inputs(x: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The six inputs of each four outputs along `axis`: B^T x.

    Args:
      x: pictures with one more pixel on each side.
      axis: of four times as many, and two, pixels.
    """
    return _sums(INPUTS, [_every_fourth(x, i, axis) for i in range(6)])


def kernels(kernel: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The six kernels of one tap along `axis` for one of three: G g."""
    return _sums(KERNELS, jnp.split(kernel, 3, axis))


def outputs(products: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """The fours of outputs along `axis` of the six products: A^T m."""
    fours = _sums(OUTPUTS, products)
    return sum(_spaced(four, axis, i) for i, four in enumerate(fours))


def outputs_back(out: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The transpose of `outputs`, of `out` with one more pixel on each side."""
    return _sums(
        zip(*OUTPUTS, strict=True), [_every_fourth(out, i, axis) for i in range(1, 5)]
    )


def kernels_back(found: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """The transpose of `kernels`."""
    return jnp.concatenate(_sums(zip(*KERNELS, strict=True), found), axis)


def _sums(matrix, parts):
    return tuple(
        sum(factor * part for factor, part in zip(row, parts, strict=True) if factor)
        for row in matrix
    )


def _every_fourth(x, first, axis):
    stop = first + x.shape[axis] - 2 - (TILE - 1)
    return lax.slice_in_dim(x, first, stop, stride=TILE, axis=axis)


def _spaced(x, axis, before):
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (before, TILE - 1 - before, TILE - 1)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)
