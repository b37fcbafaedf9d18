"""TPU slices and GPUs that are absent, to compile programs for, and what chips can do.

The data sheets of GPUs are NVIDIA's "A100/H100/H200 Tensor Core GPU", the properties
that a compiler asks for its CUDA programming guide (compute capabilities 8.0, 9.0).
"""

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
    network: float = 0  # bytes a second of its card, to where links do not reach


# What JAX takes of a GPU's memory; the driver and NCCL need some of the rest.
_SHARE = float(
    os.environ.get("XLA_CLIENT_MEM_FRACTION")
    or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    or 0.75
)

# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e. Memory: the limit that libtpu
# names. Link: jax-ml.github.io/scaling-book/tpus, one axis of the torus, both ways.
# Clock: peak over 2 x 128 x 128 (v6e: 2 x 256 x 256) operations a cycle in each of the
# chip's 8, 4, 8 and 4 matrix units. GPUs: NVIDIA's data sheets of the SXM forms, dense,
# NVLink one way; network: a card of 200 (DGX A100) or 400 Gb/s for each GPU.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75, 1200e9, 90e9, 1.05e9),
    "TPU v5 lite": Chip(197e12, 15.75, 819e9, 90e9, 1.5e9),
    "TPU v5": Chip(459e12, 95.73, 2765e9, 180e9, 1.75e9),
    "TPU v6 lite": Chip(918e12, 31.24, 1640e9, 180e9, 1.75e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, _SHARE * 39.4, 1555e9, 300e9, 0, 25e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, _SHARE * 79.1, 2039e9, 300e9, 0, 25e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, _SHARE * 79.1, 3350e9, 450e9, 0, 50e9),
    "NVIDIA H200": Chip(989e12, _SHARE * 139.8, 4800e9, 450e9, 0, 50e9),
}

# The kind, multiprocessors, their clock in GHz, cache in MiB, compute capability.
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108, 1.41, 40, "major: 8"),
    "h100": ("NVIDIA H100 80GB HBM3", 132, 1.98, 50, "major: 9"),
    "h200": ("NVIDIA H200", 132, 1.98, 50, "major: 9"),
}
GPUS_OF_A_BOX = 8
BOXES = [f"{name}-{2**power}" for name in _GPUS for power in range(10)]


def slice_devices(name: str) -> list[jax.Device]:
    """The devices of a slice, or GPUs: to compile for, not to run on.

    The process stays on the CPU, or libtpu would look for a TPU here, and does without
    JAX's cache, which cannot read back a program for an absent device.

    Raises:
      UserError: for a name not in `SLICES` or `BOXES`, or where the compiler is missing
        or fails.
    """
    names = [*SLICES, *BOXES]
    if name not in names:
        raise UserError(
            f"there is no slice {name!r}{did_you_mean(name, names)}; choose from "
            + ", ".join(names)
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    return _gpus(name) if name in BOXES else _tpus(name)


def _tpus(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"to compile for {name} install libtpu: pip install libtpu")
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


def _gpus(name: str) -> list[jax.Device]:
    try:
        # ptxas, of which jax-cuda12-plugin has none.
        importlib.import_module("nvidia.cuda_nvcc")
        versions = importlib.import_module("jax_cuda12_plugin._versions")
    except ImportError:
        raise UserError(
            f"to compile for {name} install its compiler: "
            "pip install 'imagen-jax[plan-gpu]'"
        ) from None
    # JAX asks the installed cuDNN, which only runs need, whether it is new enough.
    versions.cudnn_get_version = lambda: 91000
    generation, _, count = name.partition("-")
    hosts = -(-int(count) // GPUS_OF_A_BOX)
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=_description(generation),
        # Slices, hosts in each, GPUs in each.
        topology=f"1x{hosts}x{int(count) // hosts}",
    )
    return list(topology.devices)


def _description(generation: str) -> str:
    """A GPU as XLA describes it (`stream_executor/device_description.proto`)."""
    kind, cores, clock, cache, capability = _GPUS[generation]
    is_hopper, chip = capability == "major: 9", CHIPS[kind]
    shared = 228 if is_hopper else 164  # KiB of a multiprocessor; a block gets 1 less
    if is_hopper:
        capability += " feature_extension: ACCELERATED_FEATURES"
    return f"""
gpu_device_info {{
  name: "{kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {capability} }}
  core_count: {cores}
  fpus_per_core: {128 if is_hopper else 64}
  clock_rate_ghz: {clock}
  memory_bandwidth: {int(chip.bandwidth)}
  device_memory_size: {int(chip.memory_gib / _SHARE * 2**30)}
  l2_cache_size: {cache << 20}
  shared_memory_per_core: {shared << 10}
  shared_memory_per_block_optin: {(shared - 1) << 10}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""
