"""What a CPU keeps in memory rather than compute again wherever it is read."""

import jax

from imagen_jax.sharding import on_one_cpu


def gradient(x: jax.Array) -> jax.Array:
    """`x` itself; on one CPU its gradient is written to memory.

    XLA computes what it thinks cheap again in each fusion that reads it. Gradients of
    residual blocks become chains of hundreds of operations so (benchmarks/README.md).
    It needs `compilation.compiler_options`, which keep XLA from dropping the barrier.
    """
    return _gradient(x) if on_one_cpu() else x


@jax.custom_vjp
def _gradient(x):
    return x


_gradient.defvjp(
    lambda x: (x, None), lambda _, out: (jax.lax.optimization_barrier(out),)
)
