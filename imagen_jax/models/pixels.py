"""Sums over the pixels of pictures, by products on a CPU, where XLA sums slowly."""

import functools

import jax
import jax.numpy as jnp

from imagen_jax.sharding import on_one_cpu


def total(x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` summed over the pixels, `[B, C]`.

    XLA's loop over pixels takes a CPU three to eight times as long as a product with
    ones (benchmarks/README.md). Rows are summed first, so that rounding grows with
    H + W and not with H * W.
    """
    if on_one_cpu():
        return _total(x, x.shape[1:3])
    return x.sum((1, 2))


def spread(values: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`[B, C]` for each pixel: `[B, H, W, C]`, or what broadcasts to it.

    Args:
      values: one of each picture and channel.
      size: H and W.
    """
    if on_one_cpu():
        return _spread(values, size)
    return values[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _total(x, size):
    rows = _product(x.reshape(len(x), size[0], -1))
    return _product(rows.reshape(len(x), size[1], -1)).astype(x.dtype)


def _product(x):
    """`[B, N, M]` summed over N, in float32 at least."""
    ones, wide = jnp.ones(x.shape[:2], x.dtype), jnp.promote_types(x.dtype, "float32")
    return jnp.einsum("bn,bnm->bm", ones, x, preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(values, size):
    return jnp.broadcast_to(
        values[:, None, None], (len(values), *size, values.shape[1])
    )


# Each is the other's transpose.
_total.defvjp(
    lambda x, size: (_total(x, size), None),
    lambda size, _, out: (_spread(out, size),),
)
_spread.defvjp(
    lambda values, size: (_spread(values, size), None),
    lambda size, _, out: (_total(out, size),),
)
