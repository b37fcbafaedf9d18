"""Convolution on one CPU, in forms that XLA is fast at there."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from imagen_jax.models import winograd
from imagen_jax.models.product import product, to_kernel

# Of so many pictures and more XLA's own gradients are as fast (benchmarks/README.md).
FEW = 8
# Fours of outputs are computed at once for so many channels in and out and pixels.
WIDE, LARGE = 32, 1024

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Pads):
    """`lax.conv_general_dilated` of NHWC and HWIO, up to the order of sums.

    Wide kernels of 3 x 3 are Winograd's. For the others, and few pictures: XLA's
    gradient of a kernel is a convolution of two dimensions whose channels are the
    batch. With few of them it takes up to three times as long as one of one dimension
    whose channels are the batch's columns.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[h, w, C, features]`.
      strides: of H and W.
      pads: zeros before and behind H and W.

    Returns:
      `[B, H', W', features]`.
    """
    strides, pads = tuple(strides), tuple(map(tuple, pads))
    if (kernel.shape[:2], strides, pads) == ((1, 1), (1, 1), ((0, 0), (0, 0))):
        return product(x, kernel[0, 0])
    if _is_wide(x, kernel, strides, pads):
        return _in_fours(x, kernel)
    if len(x) < FEW:
        return _convolve(x, kernel, strides, pads)
    return _plain(x, kernel, strides, pads)


def _is_wide(x, kernel, strides, pads) -> bool:
    """Whether fewer products are worth the sums for it."""
    usual = (kernel.shape[:2], strides, pads) == ((3, 3), (1, 1), ((1, 1), (1, 1)))
    whole = x.shape[1] % winograd.TILE == x.shape[2] % winograd.TILE == 0
    exact = jnp.finfo(x.dtype).bits >= 32
    large = x.shape[0] * x.shape[1] * x.shape[2] >= LARGE
    return usual and whole and exact and large and min(kernel.shape[2:]) >= WIDE


def _plain(x, kernel, strides, pads):
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))


def _forward(x, kernel, strides, pads):
    return _plain(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, kept, out):
    # What is made of the kernel waits for the rest, not to lie in memory for so long.
    x, kernel, out = lax.optimization_barrier((*kept, out))
    _, to_x = jax.vjp(lambda x: _plain(x, kernel, strides, pads), x)
    return *to_x(out), _to_kernel(x, out, kernel.shape[:2], strides, pads)


@jax.custom_vjp
def _in_fours(x, kernel):
    """A 3 x 3 convolution of zero padded pictures, by fours of rows.

    The kernel's gradient is by squares of four, whose roundings its many terms hide.
    """
    return _of_padded(*lax.optimization_barrier((jnp.pad(x, _BORDER), kernel)))


def _of_padded(x, kernel):
    products = (
        _plain(part, tap, (1, 1), ((0, 0), (0, 0)))
        for part, tap in zip(
            winograd.inputs(x, 1), winograd.kernels(kernel, 0), strict=True
        )
    )
    return lax.optimization_barrier(winograd.outputs(tuple(products), 1))


def _in_fours_backward(kept, out):
    x, kernel = kept
    x, out = jnp.pad(x, _BORDER), jnp.pad(out, _BORDER)
    x, kernel, out = lax.optimization_barrier((x, kernel, out))
    turned = lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))
    to_x = _of_padded(out, turned)
    rows = zip(winograd.inputs(x, 1), winograd.outputs_back(out, 1), strict=True)
    found = [_of_columns(*lax.optimization_barrier(pair)) for pair in rows]
    return to_x, winograd.kernels_back(tuple(found), 0)


def _of_columns(x, out):
    parts = zip(winograd.inputs(x, 2), winograd.outputs_back(out, 2), strict=True)
    products = (to_kernel(a, b)[None, None] for a, b in parts)
    return lax.optimization_barrier(winograd.kernels_back(tuple(products), 1))


_BORDER = ((0, 0), (1, 1), (1, 1), (0, 0))
_in_fours.defvjp(
    lambda x, kernel: (_in_fours(x, kernel), (x, kernel)), _in_fours_backward
)


def _to_kernel(x, out, size, strides, pads):
    """The kernel's gradient: what is transposed is the side of fewer channels."""
    if x.shape[-1] < out.shape[-1] and tuple(strides) == (1, 1):
        # With x and the result in each other's place offsets change their signs.
        pads = tuple((n - 1 - before,) * 2 for n, (before, _) in zip(size, pads))
        found = _along_rows(out, x, size, (1, 1), pads)
        return found[::-1, ::-1].swapaxes(2, 3)
    return _along_rows(x, out, size, strides, pads)


def _along_rows(x, out, size, strides, pads):
    """The kernel's gradient, convolved along H; columns are so many batches."""
    batch, height, width, features = out.shape
    channels, columns = x.shape[-1], x.shape[2]
    lines = x.transpose(3, 1, 0, 2).reshape(channels, -1, batch * columns)
    reach = strides[1] * (width - 1) + 1
    low_rows = pads[0][0]
    high_rows = strides[0] * (height - 1) + size[0] - low_rows - x.shape[1]

    def of_column(i):
        low = i - pads[1][0]
        moved = lax.pad(
            out,
            jnp.zeros((), out.dtype),
            (
                (0, 0, 0),
                (0, 0, 0),
                (low, columns - reach - low, strides[1] - 1),
                (0, 0, 0),
            ),
        )
        return lax.conv_general_dilated(
            lines,
            moved.transpose(1, 0, 2, 3).reshape(height, -1, features),
            (1,),
            ((low_rows, high_rows),),
            rhs_dilation=(strides[0],),
            dimension_numbers=("NHC", "HIO", "NHC"),
        )

    found = jnp.stack([of_column(i) for i in range(size[1])])
    return found.transpose(2, 0, 1, 3)


_convolve.defvjp(_forward, _backward)
