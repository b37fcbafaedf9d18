"""TPU slices that are not here, to compile programs for."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from imagen_jax.errors import UserError, did_you_mean

# Chips along x, y and z of a TPU v4 slice; a name counts TensorCores, two to a chip.
SLICES = {
    "v4-8": (2, 2, 1),
    "v4-16": (2, 2, 2),
    "v4-32": (2, 2, 4),
    "v4-64": (2, 4, 4),
    "v4-128": (4, 4, 4),
    "v4-256": (4, 4, 8),
    "v4-512": (4, 8, 8),
    "v4-1024": (8, 8, 8),
}


def slice_devices(name: str) -> list[jax.Device]:
    """The devices of a slice, one per chip: to compile for, not to run on.

    The process itself stays on the CPU, or libtpu would look for a TPU here.

    Args:
      name: a key of `SLICES`.

    Raises:
      UserError: for another name, or where libtpu is not installed or fails.
    """
    if name not in SLICES:
        raise UserError(
            f"there is no slice {name!r}{did_you_mean(name, SLICES)}; "
            f"there is: {', '.join(SLICES)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"to compile for {name} install libtpu: pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    # libtpu would ask the metadata server of a TPU machine what it is, and lock the
    # whole machine against a second process that compiles.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name="v4:" + "x".join(map(str, SLICES[name])),
            chip_config_name="megacore",
            chips_per_host_bounds=(2, 2, 1),
            num_slices=1,
        )
    except RuntimeError as error:
        raise UserError(
            f"libtpu cannot describe {name}: {' '.join(str(error).split())}"
        ) from None
    return list(topology.devices)
