"""Convolution of few pictures on one CPU, with gradients that XLA is fast at there."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

# Of so many pictures and more XLA's own gradients are as fast (benchmarks/README.md).
FEW = 8

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Pads):
    """`lax.conv_general_dilated` of NHWC and HWIO, up to the order of sums.

    XLA's gradient of a kernel is a convolution of two dimensions whose channels are
    the batch. With few channels it takes up to three times as long as one of one
    dimension whose channels are the batch's columns.

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
        return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])
    return _convolve(x, kernel, strides, pads)


def _plain(x, kernel, strides, pads):
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))


def _forward(x, kernel, strides, pads):
    return _plain(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, kept, out):
    x, kernel = kept
    _, to_x = jax.vjp(lambda x: _plain(x, kernel, strides, pads), x)
    return *to_x(out), _to_kernel(x, out, kernel.shape[:2], strides, pads)


def _to_kernel(x, out, size, strides, pads):
    """The kernel's gradient, along H; its columns are so many batches."""
    batch, height, width, features = out.shape
    x = jnp.pad(x.transpose(3, 1, 0, 2), ((0, 0), pads[0], (0, 0), pads[1]))
    reach = strides[1] * (width - 1) + 1
    columns = [x[..., i : i + reach : strides[1]] for i in range(size[1])]
    x = jnp.stack(columns)
    found = lax.conv_general_dilated(
        x.reshape(-1, x.shape[2], batch * width),
        out.transpose(1, 0, 2, 3).reshape(height, batch * width, features),
        (1,),
        "VALID",
        rhs_dilation=(strides[0],),
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    found = found.reshape(size[1], -1, found.shape[1], features)[:, :, : size[0]]
    return found.transpose(2, 0, 1, 3)


_convolve.defvjp(_forward, _backward)
