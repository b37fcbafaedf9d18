"""Convolution of images whose rows are split over devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from imagen_jax.sharding import image_spec


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], *_: Any, **__: Any
) -> jax.Array:
    """The convolution that `nn.Conv` calls, with zeros as "SAME" padding.

    `[B, H, W, C]` and `[h, w, C, features]` to `[B, ceil(H / stride), ..., features]`.
    Where the mesh (`sharding.on_mesh`) splits rows, each device convolves its own and
    gets the rows beyond their borders from its neighbours.
    """
    mesh = jax.sharding.get_abstract_mesh()
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, "SAME")
    if mesh.size > 1 and mesh.shape["spatial"] > 1:
        return _by_rows(x, kernel, strides, pads, mesh)
    return _convolve(x, kernel, strides, pads)


def _convolve(x, kernel, strides, pads):
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _by_rows(x, kernel, strides, pads, mesh):
    # XLA's partitioner (jaxlib 0.10.2) computes wrong convolutions where both rows and
    # output channels are split, and wrong gradients where rows are.
    (above, below), columns = pads
    spec = image_spec(x.shape, mesh, strides[0])
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
        # A device without that neighbour gets zeros: the padding.
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
