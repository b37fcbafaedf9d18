"""How programs are compiled, and where compiled programs are kept."""

import functools
import glob
import os
from importlib.util import find_spec

import jax
from jax.sharding import Mesh, SingleDeviceSharding

# Convolutions run faster without the library that XLA hands them to on a CPU: a step of
# configs/tiny.py takes a tenth less time (benchmarks/README.md).
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}
# A CPU takes longer to optimise the drawing of parameters than to draw them.
_CPU_ONCE = {"xla_backend_optimization_level": 0}
# For plans: content with slower convolutions, and writing equal code once, the compiler
# takes less than half the time, or a third where its cycles are not wanted either.
_QUICK_TPU = {
    "xla_jf_convolution_performance_target": 0.5,
    "xla_tpu_enable_deduplicated_calls": True,
}
_TPU = {**_QUICK_TPU, "xla_jf_convolution_performance_target": 0.96}
# Tiles of Triton's products are found by running them; without, cuBLAS computes all.
_GPU = {"xla_gpu_enable_triton_gemm": False}


def use_compilation_cache(wanted: bool = True) -> None:
    """Keeps programs in JAX_COMPILATION_CACHE_DIR or the user's cache directory.

    Unless `wanted`, none are kept or read. Call it before any is compiled. JAX keeps
    those that took more than a second, and never removes any.
    """
    jax.config.update("jax_enable_compilation_cache", wanted)
    if wanted and not jax.config.jax_compilation_cache_dir:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(caches, "imagen-jax", "jax")
        jax.config.update("jax_compilation_cache_dir", folder)


def pass_over_libtpu() -> None:
    """Lets JAX look for no TPU where libtpu is installed, as for plans, and none is.

    It would print a page about it. Nothing changes for whoever sets JAX_PLATFORMS, or
    has a plugin of JAX for another accelerator. Call it before devices are asked for.
    """
    found = [find_spec(name) is not None for name in ("libtpu", "jax_plugins")]
    is_here = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/*")]
    # Whatever Google has put into the machine might be one.
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with open(vendor) as file:
            is_here += [vendor] if file.read().strip() == "0x1ae0" else []
    if found == [True, False] and not is_here and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def compiler_options(
    mesh: Mesh, dtype: str, *, once: bool = False
) -> dict[str, str | float]:
    """What to give as `compiler_options` to `jax.jit`.

    The program runs on `mesh`, and its network computes in `dtype`. If it runs `once`,
    compiling is most of its cost.
    """
    device, options = mesh.devices.flat[0], {}
    if device.platform == "cpu" and once:
        options = _CPU_ONCE
    # Without the library jaxlib 0.10.2 cannot compile the gradient of bfloat16
    # attention with one query: "Dot with multiple contracting dimensions".
    elif device.platform == "cpu" and dtype == "float32":
        options = _CPU
    return _accepted(options, device)


def planning_options(device: jax.Device, quick: bool) -> dict[str, str | float]:
    """Further options for a program that is compiled to be read, as devices are absent.

    Memory, work and exchanges are those of the program that is trained. Estimates of
    cycles are nothing like it if `quick`. For devices that are here there are none.
    """
    if device.platform == jax.default_backend():
        return {}
    tpu = _QUICK_TPU if quick else _TPU
    return _accepted(tpu if device.platform == "tpu" else _GPU, device)


def _accepted(options: dict[str, str | float], device: jax.Device) -> dict:
    """The options if this compiler knows them all; they are no stable interface."""
    known = options and _knows(tuple(options.items()), device)
    return options if known else {}


@functools.cache
def _knows(options: tuple[tuple[str, str | float], ...], device: jax.Device) -> bool:
    one = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(one).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
