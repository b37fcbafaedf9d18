"""Convolution of pictures whose rows lie on many devices, and its gradient on a CPU."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from imagen_jax.sharding import picture_spec

# Up to so many pixels per channel a CPU multiplies faster than it convolves backwards
# (benchmarks/README.md).
_PIXELS_PER_CHANNEL = 8


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], *_: Any, **__: Any
) -> jax.Array:
    """A convolution, zero padded as "SAME" pads; what `nn.Conv` calls.

    On a mesh (`sharding.on_mesh`) that has an axis spatial each device convolves its
    own rows and gets the rows at their borders from its neighbours.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[h, w, C, features]`.
      strides: of H and W.

    Returns:
      `[B, ceil(H / stride), ceil(W / stride), features]`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, "SAME")
    if mesh.size > 1 and mesh.shape["spatial"] > 1:
        return _by_rows(x, kernel, strides, pads, mesh)
    if tuple(strides) == (1, 1) and _multiplies(x, kernel, mesh):
        return _with_products(x, kernel)
    return _convolve(x, kernel, strides, pads)


def _convolve(x, kernel, strides, pads):
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _by_rows(x, kernel, strides, pads, mesh):
    # By hand, for XLA's partitioner (jaxlib 0.10.2) gets convolutions wrong whose rows
    # and output channels are both split, and gradients of those whose rows are.
    (above, below), columns = pads
    spec = picture_spec(x.shape, mesh, strides[0])
    shards = mesh.shape["spatial"] if spec[1] else 1
    if x.shape[1] // shards < max(above, below):
        spec, shards = PartitionSpec(spec[0], None, None, None), 1
    split = kernel.shape[-1] % mesh.shape["tensor"] == 0
    features = "tensor" if split else None

    def own_rows(x, kernel):
        if shards == 1:
            return _convolve(x, kernel, strides, pads)
        down = [(i, i + 1) for i in range(shards - 1)]
        up = [(i + 1, i) for i in range(shards - 1)]
        parts = [x]
        # Who has no neighbour gets zeros, which is the padding.
        if above:
            parts.insert(0, lax.ppermute(x[:, -above:], "spatial", down))
        if below:
            parts.append(lax.ppermute(x[:, :below], "spatial", up))
        return _convolve(jnp.concatenate(parts, 1), kernel, strides, ((0, 0), columns))

    return jax.shard_map(
        own_rows,
        in_specs=(spec, PartitionSpec(None, None, None, features)),
        out_specs=PartitionSpec(*spec[:3], features),
    )(x, kernel)


def _multiplies(x, kernel, mesh) -> bool:
    """Whether the gradient is products: on a CPU, of few pixels with many channels."""
    device = mesh.abstract_device
    if device is None or device.platform != "cpu" or x.dtype != jnp.float32:
        return False
    b, h, w, _ = x.shape
    return b * h * w <= _PIXELS_PER_CHANNEL * min(kernel.shape[2:])


@jax.custom_vjp
def _with_products(x, kernel):
    return _convolve(x, kernel, (1, 1), "SAME")


def _forward(x, kernel):
    return _with_products(x, kernel), (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    b, h, w, fan_in = x.shape
    rows, columns, _, features = kernel.shape
    taps = [(i, j) for i in range(rows) for j in range(columns)]
    top, left = (rows - 1) // 2, (columns - 1) // 2
    bottom, right = rows - 1 - top, columns - 1 - left
    # What each pixel's gradient is to the pixels around it, laid where these are.
    apart = lax.dot_general(
        gradient.reshape(-1, features),
        kernel.reshape(-1, features),
        (((1,), (1,)), ((), ())),
    ).reshape(b, h, w, len(taps), fan_in)
    dx = sum(
        jnp.pad(
            apart[:, :, :, tap],
            ((0, 0), (i, bottom + top - i), (j, left + right - j), (0, 0)),
        )
        for tap, (i, j) in enumerate(taps)
    )[:, top : top + h, left : left + w]
    # The gradients around each pixel, times the pixel.
    padded = jnp.pad(gradient, ((0, 0), (bottom, top), (right, left), (0, 0)))
    around = [padded[:, rows - 1 - i :, columns - 1 - j :][:, :h, :w] for i, j in taps]
    dkernel = lax.dot_general(
        x.reshape(-1, fan_in),
        jnp.concatenate(around, -1).reshape(b * h * w, -1),
        (((0,), (0,)), ((), ())),
    ).reshape(fan_in, rows, columns, features)
    return dx, dkernel.transpose(1, 2, 0, 3)


_with_products.defvjp(_forward, _backward)
