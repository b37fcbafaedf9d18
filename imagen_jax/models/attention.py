"""Softmax attention: XLA's, or on TPUs the Pallas kernel that comes with JAX."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from imagen_jax.sharding import row_shards

# Rows and columns of the tiles that the TPU kernel works on.
_TILE = 128
_LARGEST_BLOCK = 512


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention; a query without any real key gets zeros.

    Logits and softmax are float32. In a program for a TPU (`sharding.on_mesh`) the
    kernel is used where it fits: logits never reach the memory (benchmarks/README.md).

    Args:
      q, k, v: `[B, T, N, D]`, and twice `[B, S, N, D]`.
      mask: `[B, S]` bool, True where a key is real.

    Returns:
      `[B, T, N * D]`.
    """
    if _kernel_fits(q.shape, k.shape):
        out = flash_attention(q, k, v, mask)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    out = jnp.where(mask.any(1)[:, None, None, None], out, 0)
    return out.reshape(*out.shape[:2], -1)


def _kernel_fits(queries: tuple[int, ...], keys: tuple[int, ...]) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is None or device.platform != "tpu":
        return False
    divides = queries[0] % row_shards(mesh) == 0
    # Heads are narrower than a tile, or whole tiles.
    width = queries[3] < _TILE or queries[3] % _TILE == 0
    lengths = queries[1] % _TILE == 0 and keys[1] % _TILE == 0
    return divides and width and lengths


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """`attend` by the TPU kernel; each device computes its rows and heads.

    T and S are multiples of 128, B is a multiple of `row_shards`. The result is
    `[B, T, N, D]`, arbitrary where a query has no real key.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2:
        return _flash(q, k, v, mask)
    rows = ("data", "fsdp")
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    whole = PartitionSpec(rows, None, heads)
    # Queries are pixels, whose rows may be split; each attends to all keys.
    divides = q.shape[1] % (_TILE * mesh.shape["spatial"]) == 0
    queries = PartitionSpec(rows, "spatial" if divides else None, heads)
    return jax.shard_map(
        _flash,
        in_specs=(queries, whole, whole, PartitionSpec(rows)),
        out_specs=queries,
        # A kernel does not declare over which mesh axes its result varies.
        check_vma=False,
    )(q, k, v, mask)


def _flash(q, k, v, mask):
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
