"""How programs are compiled on each platform."""

import functools

import jax
from jax.sharding import Mesh

# Small convolutions and products run at half speed in the library that XLA hands
# them to on CPUs (benchmarks/README.md).
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What to give as `compiler_options` to `jax.jit` for programs on `mesh`."""
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    return _CPU if _accepted() else {}


@functools.cache
def _accepted() -> bool:
    """Whether this jaxlib knows the options; they are experimental in name."""
    try:
        jax.jit(lambda x: x, compiler_options=_CPU).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
