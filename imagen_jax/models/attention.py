"""Softmax attention: XLA's, on TPUs a Pallas kernel of JAX, on GPUs cuDNN's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from imagen_jax.sharding import row_shards

# Rows and columns of the tiles that the TPU kernel works on.
_TILE = 128
_LARGEST_BLOCK = 512


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention; a query without any real key gets zeros.

    Logits and softmax are float32. Where a kernel fits the program's device
    (`sharding.on_mesh`), logits never reach the memory (benchmarks/README.md).

    Args:
      q, k, v: `[B, T, N, D]`, and twice `[B, S, N, D]`.
      mask: `[B, S]` bool, True where a key is real. On GPUs the real ones come first,
        as text is padded at its end.

    Returns:
      `[B, T, N * D]`.
    """
    if kernel := _kernel(q, k):
        out = by_kernel(kernel, q, k, v, mask)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    out = jnp.where(mask.any(1)[:, None, None, None], out, 0)
    return out.reshape(*out.shape[:2], -1)


def _kernel(q: jax.Array, k: jax.Array) -> Callable | None:
    """The kernel for the device that the program is for, if it fits the arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    device, (rows, pixels, _, width) = mesh.abstract_device, q.shape
    if device is None or rows % row_shards(mesh):
        return None
    if device.platform == "tpu":
        # Heads are narrower than a tile, or whole tiles.
        fits = width < _TILE or width % _TILE == 0
        return flash if fits and not (pixels % _TILE or k.shape[1] % _TILE) else None
    # One query, as text is pooled with, is no work. Wider heads need a Hopper, and
    # occur where there are few pixels.
    fits = q.dtype == jnp.bfloat16 and width <= 128 and width % 8 == 0 and pixels > 1
    return cudnn if device.platform == "gpu" and fits else None


def by_kernel(
    kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """`attend` by a kernel (`flash`, `cudnn`); each device does its rows and heads.

    B is a multiple of `row_shards`. The result is `[B, T, N, D]`, arbitrary where a
    query has no real key.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2:
        return kernel(q, k, v, mask)
    rows = ("data", "fsdp")
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    whole = PartitionSpec(rows, None, heads)
    # Queries are pixels, whose rows may be split; each attends to all keys.
    divides = q.shape[1] % (_TILE * mesh.shape["spatial"]) == 0
    queries = PartitionSpec(rows, "spatial" if divides else None, heads)
    return jax.shard_map(
        kernel,
        in_specs=(queries, whole, whole, PartitionSpec(rows)),
        out_specs=queries,
        # A kernel does not declare over which mesh axes its result varies.
        check_vma=False,
    )(q, k, v, mask)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Flash attention of cuDNN to the first `mask.sum(1)` keys, at least one; bfloat16.

    It takes no mask of keys alone.
    """
    lengths = jnp.maximum(mask.sum(1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """The TPU kernel; T and S are multiples of 128."""
    # Imported here because only TPUs need it.
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    rows, columns = _block(q.shape[2]), _block(k.shape[2])
    sizes = pallas.BlockSizes(
        block_q=rows,
        block_k_major=columns,
        block_k=columns,
        block_b=1,
        block_q_major_dkv=rows,
        block_k_major_dkv=columns,
        block_k_dkv=columns,
        block_q_dkv=rows,
        block_k_major_dq=columns,
        block_k_dq=columns,
        block_q_dq=rows,
    )
    # Queries attend to keys of their own segment.
    segments = pallas.SegmentIds(
        q=jnp.ones((q.shape[0], q.shape[2]), jnp.int32), kv=mask.astype(jnp.int32)
    )
    out = pallas.flash_attention(
        q, k, v, segment_ids=segments, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes
    )
    return out.transpose(0, 2, 1, 3)


def _block(length: int) -> int:
    """The largest multiple of the tile that divides `length`, up to a limit."""
    sizes = range(_TILE, _LARGEST_BLOCK + 1, _TILE)
    return max(size for size in sizes if length % size == 0)
