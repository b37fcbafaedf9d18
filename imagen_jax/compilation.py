"""How programs are compiled on each platform."""

import functools
import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagen_jax.planning.chips import is_absent

# Convolutions run faster without the library that XLA hands them to on CPUs
# (benchmarks/README.md).
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}
# A CPU takes longer to optimise the drawing of parameters than to draw them.
_CPU_ONCE = {"xla_backend_optimization_level": 0}
# What is only planned is not run: convolutions may be 4 % slower than the best that the
# compiler knows, for which it takes more than twice as long (benchmarks/README.md).
# Equal code is written once: less than half of the base's program.
_PLANNED = {
    "xla_jf_convolution_performance_target": 0.96,
    "xla_tpu_enable_deduplicated_calls": True,
}


def use_compilation_cache() -> None:
    """Keeps compiled programs from process to process; call it before any is compiled.

    They lie in JAX_COMPILATION_CACHE_DIR, or else in the user's cache directory. JAX
    keeps those that took more than a second, and never removes any.
    """
    if not jax.config.jax_compilation_cache_dir:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(caches, "imagen-jax", "jax")
        jax.config.update("jax_compilation_cache_dir", folder)


def compiler_options(
    mesh: Mesh, *, dtype: str = "float32", once: bool = False
) -> dict[str, str | float]:
    """What to give as `compiler_options` to `jax.jit`.

    Args:
      mesh: where the program runs.
      dtype: what its network computes in.
      once: whether it runs a single time, so that compiling is most of its cost.
    """
    device = mesh.devices.flat[0]
    if is_absent(device):
        options = _PLANNED
    elif device.platform != "cpu":
        return {}
    elif once:
        options = _CPU_ONCE
    elif dtype == "float32":
        options = _CPU
    else:
        # Without the library jaxlib 0.10.2 cannot compile the gradient of bfloat16
        # attention with one query: "Dot with multiple contracting dimensions".
        return {}
    return options if _accepted(tuple(options.items()), device) else {}


@functools.cache
def _accepted(options: tuple[tuple[str, str | float], ...], device: jax.Device) -> bool:
    """Whether this compiler knows the options; they are no stable interface."""
    here = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    number = jax.ShapeDtypeStruct((), "float32", sharding=here)
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(number).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
