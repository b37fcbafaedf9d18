"""How programs are compiled on each platform."""

import functools

import jax
from jax.sharding import Mesh

# Convolutions run faster without the library that XLA hands them to on CPUs
# (benchmarks/README.md).
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
    if once:
        options = _CPU_ONCE
    elif dtype == "float32":
        options = _CPU
    else:
        # Without the library jaxlib 0.10.2 cannot compile the gradient of bfloat16
        # attention with one query: "Dot with multiple contracting dimensions".
        return {}
    return options if _accepted(tuple(options.items())) else {}


@functools.cache
def _accepted(options: tuple[tuple[str, str | int], ...]) -> bool:
    """Whether this jaxlib knows the options; they are no stable interface."""
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
