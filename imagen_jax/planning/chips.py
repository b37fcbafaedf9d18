"""TPU slices that are absent, to compile programs for, and what chips can do."""

import dataclasses
import importlib.util
import math
import os

import jax
from jax.experimental import topologies

from imagen_jax.errors import UserError, did_you_mean

# Chips along x, y and z. Names of v4 and v5p slices count TensorCores, two to a chip,
# those of the others count chips. Google Cloud's v5litepod is called v5e elsewhere.
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split()
_SQUARES = "2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
_CORES = {"v4": 2, "v5litepod": 1, "v5e": 1, "v5p": 2, "v6e": 1}
SLICES = {
    f"{generation}-{cores * math.prod(map(int, chips.split('x')))}": chips
    for generation, cores in _CORES.items()
    for chips in (_CUBES if cores == 2 else _SQUARES)
}
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, by its maker's data sheet."""

    flops: float  # bfloat16 operations a second
    memory_gib: float  # of its main memory, what programs may use
    bandwidth: float  # bytes a second from and to that memory
    link: float  # bytes a second that it can send to other chips for one exchange
    clock: float = 0  # cycles a second; 0 where it is of no use


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e. Memory: the limit that libtpu
# names. Link: jax-ml.github.io/scaling-book/tpus, one axis of the torus, both ways.
# Clock: peak over 2 x 128 x 128 (v6e: 2 x 256 x 256) operations a cycle in each of the
# chip's 8, 4, 8 and 4 matrix units. GPUs: NVIDIA's data sheets of the SXM forms, dense,
# NVLink one way; of their memory JAX takes three quarters unless told otherwise.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75, 1200e9, 90e9, 1.05e9),
    "TPU v5 lite": Chip(197e12, 15.75, 819e9, 90e9, 1.5e9),
    "TPU v5": Chip(459e12, 95.73, 2765e9, 180e9, 1.75e9),
    "TPU v6 lite": Chip(918e12, 31.24, 1640e9, 180e9, 1.75e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 29.5, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 59.4, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 59.4, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 104.8, 4800e9, 450e9),
}


def slice_devices(name: str) -> list[jax.Device]:
    """The devices of a slice, one per chip: to compile for, not to run on.

    The process stays on the CPU, or libtpu would look for a TPU here, and does without
    JAX's cache, which cannot read back a program for an absent device.

    Raises:
      UserError: for a name not in `SLICES`, or where libtpu is missing or fails.
    """
    if name not in SLICES:
        raise UserError(
            f"there is no slice {name!r}{did_you_mean(name, SLICES)}; choose from "
            + ", ".join(SLICES)
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"to compile for {name} install libtpu: pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    # libtpu would ask a TPU machine's metadata server what it is, complain that there
    # is none, and lock the whole machine against a second process that compiles.
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    generation = name.partition("-")[0].replace("v5litepod", "v5e")
    # Both cores of a chip are one device.
    paired = {"chip_config_name": "megacore"} if _CORES[generation] == 2 else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{generation}:{SLICES[name]}",
            chips_per_host_bounds=(2, 2, 1),
            num_slices=1,
            **paired,
        )
    except RuntimeError as error:
        raise UserError(
            f"libtpu cannot describe {name}: {' '.join(str(error).split())}"
        ) from None
    return list(topology.devices)
