"""The product of many vectors with a kernel, with gradients that suit one CPU."""

import math
from typing import Any

import jax
from jax import lax

from imagen_jax.sharding import on_one_cpu


def dot_general(
    x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any
) -> jax.Array:
    """`lax.dot_general` of x's last axis with kernel's first; what `nn.Dense` calls."""
    if on_one_cpu():
        return product(x, kernel)
    return lax.dot_general(x, kernel, dimensions, **options)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[..., C]` times `[C, ...]`.

    JAX's gradient of the kernel is a product that is transposed then, for which XLA
    writes all of one factor transposed. Here each gradient is a product as it is.
    """
    found = _dot(_rows(x, 1), kernel.reshape(len(kernel), -1), 1, 0)
    return found.reshape(*x.shape[:-1], *kernel.shape[1:])


def _forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _backward(kept, out):
    x, kernel = kept
    out = _rows(out, kernel.ndim - 1)
    to_x = _dot(out, kernel.reshape(len(kernel), -1), 1, 1)
    return to_x.reshape(x.shape), to_kernel(x, out).reshape(kernel.shape)


product.defvjp(_forward, _backward)


def to_kernel(x: jax.Array, out: jax.Array) -> jax.Array:
    """`[..., C]` and `[..., F]` multiplied and summed over all but these: `[C, F]`."""
    return _dot(_rows(x, 1), _rows(out, 1), 0, 0)


def _rows(x, axes):
    """The last so many axes as one, and all before them as another."""
    return x.reshape(-1, math.prod(x.shape[x.ndim - axes :]))


def _dot(left, right, axis, with_axis):
    return lax.dot_general(left, right, (((axis,), (with_axis,)), ((), ())))
