"""How programs are compiled on each platform."""

import functools

import jax
from jax.sharding import Mesh

# Small convolutions and products run faster without the library that XLA hands them to
# on CPUs (benchmarks/README.md).
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}
# A CPU takes longer to optimise the drawing of parameters than to draw them.
_CPU_ONCE = {"xla_backend_optimization_level": 0}


def compiler_options(
    mesh: Mesh, *, dtype: str = "float32", once: bool = False
) -> dict[str, str | int]:
    """What to give as `compiler_options` to `jax.jit`.

    Args:
      mesh: where the program runs.
      dtype: what its network computes in.
      once: whether it runs a single time, so that compiling is most of its cost.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    # XLA 0.10.2 without the library cannot compile the gradient of bfloat16 attention
    # with a single query: "Dot with multiple contracting dimensions".
    if dtype != "float32" and not once:
        return {}
    options = _CPU_ONCE if once else _CPU
    return options if _accepted(tuple(options.items())) else {}


@functools.cache
def _accepted(options: tuple[tuple[str, str | int], ...]) -> bool:
    """Whether this jaxlib knows the options; they are no stable interface."""
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
