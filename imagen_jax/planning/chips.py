"""TPU slices that are not here, to compile programs for."""

import dataclasses
import importlib.util
import os

import jax
from jax.experimental import topologies

from imagen_jax.errors import UserError, did_you_mean

# Chips along x, y and z. The names of v4 and v5p count TensorCores, two to a chip,
# those of the others chips. What is called v5e elsewhere is v5litepod to gcloud.
_CUBES = {
    8: (2, 2, 1),
    16: (2, 2, 2),
    32: (2, 2, 4),
    64: (2, 4, 4),
    128: (4, 4, 4),
    256: (4, 4, 8),
    512: (4, 8, 8),
    1024: (8, 8, 8),
    2048: (8, 8, 16),
    4096: (8, 16, 16),
}
_SQUARES = {
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
SLICES = {
    **{f"v4-{cores}": chips for cores, chips in _CUBES.items()},
    **{f"v5litepod-{n}": chips for n, chips in _SQUARES.items()},
    **{f"v5e-{n}": chips for n, chips in _SQUARES.items()},
    **{f"v5p-{cores}": chips for cores, chips in _CUBES.items()},
    **{f"v6e-{n}": chips for n, chips in _SQUARES.items()},
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, by its maker's data sheet.

    Attributes:
      name: of the kind.
      flops: bfloat16 operations a second.
      memory_gib: of its main memory, what programs may use.
      bandwidth: bytes a second from and to that memory.
      link: bytes a second that it can send to other chips for one exchange.
      clock: cycles a second; 0 where it is of no use.
    """

    name: str
    flops: float
    memory_gib: float
    bandwidth: float
    link: float
    clock: float = 0


# Peak, memory and its bandwidth: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e. Usable
# memory: the limit that libtpu 0.0.52 names when a program does not fit. A link is 45
# (v4, v5e) or 90 GB/s each way (jax-ml.github.io/scaling-book/tpus); an exchange takes
# one axis of the torus, both ways round. Clock: peak over 2 x 128 x 128 (v6e: 2 x 256 x
# 256) operations a cycle in each of the chip's 8, 4, 8 and 4 matrix units.
# GPUs: NVIDIA's data sheets of the SXM forms, dense, NVLink one way; of their memory
# JAX takes three quarters unless told otherwise.
CHIPS = {
    "TPU v4": Chip("TPU v4", 275e12, 30.75, 1200e9, 90e9, 1.05e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 15.75, 819e9, 90e9, 1.5e9),
    "TPU v5": Chip("TPU v5p", 459e12, 95.73, 2765e9, 180e9, 1.75e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 31.24, 1640e9, 180e9, 1.75e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 29.5, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 312e12, 59.4, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 59.4, 3350e9, 450e9),
    "NVIDIA H200": Chip("H200", 989e12, 104.8, 4800e9, 450e9),
}
# Where libtpu's name is another.
_GENERATIONS = {"v5litepod": "v5e"}


def slice_devices(name: str) -> list[jax.Device]:
    """The devices of a slice, one per chip: to compile for, not to run on.

    The process itself stays on the CPU, or libtpu would look for a TPU here.

    Args:
      name: a key of `SLICES`.

    Raises:
      UserError: for another name, or where libtpu is not installed or fails.
    """
    if name not in SLICES:
        near = {s.partition("-")[0]: [] for s in SLICES}
        for each in SLICES:
            near[each.partition("-")[0]].append(each.partition("-")[2])
        raise UserError(
            f"there is no slice {name!r}{did_you_mean(name, SLICES)}; there is: "
            + ", ".join(f"{g}-{'|'.join(sizes)}" for g, sizes in near.items())
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"to compile for {name} install libtpu: pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    # libtpu would ask the metadata server of a TPU machine what it is, complain that
    # there is none, and lock the whole machine against a second process that compiles.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = SLICES[name]
    generation = name.partition("-")[0]
    generation = _GENERATIONS.get(generation, generation)
    # Both cores of a chip are one device.
    paired = {"chip_config_name": "megacore"} if len(chips) == 3 else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{generation}:{'x'.join(map(str, chips))}",
            chips_per_host_bounds=(2, 2, 1),
            num_slices=1,
            **paired,
        )
    except RuntimeError as error:
        raise UserError(
            f"libtpu cannot describe {name}: {' '.join(str(error).split())}"
        ) from None
    return list(topology.devices)


def is_absent(device: jax.Device) -> bool:
    """Whether programs for a device can be compiled here, but not run."""
    return device.platform != jax.default_backend()


def chip_of(device: jax.Device) -> Chip | None:
    """What a device can do; None where no data sheet is known."""
    return CHIPS.get(device.device_kind)
