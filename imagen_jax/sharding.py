"""The device mesh, and which mesh axis each axis of an array is split over."""

import functools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError

# The last axes exchange the most, so their neighbours are neighbours in the machine.
AXES = ("data", "fsdp", "spatial", "tensor")
# What NVIDIA's driver makes.
_NVIDIA = ("/dev/nvidia0", "/proc/driver/nvidia")

# Mesh axes of the logical axes that parameters are declared with; None is whole.
# Weights are split along their input over fsdp and along their output over tensor.
RULES = (
    *(("in", "fsdp"), ("out", "tensor"), ("heads", "tensor"), ("vocab", "tensor")),
    *dict.fromkeys(("kernel_h", "kernel_w", "head_dim", "norm", "buckets")).items(),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `cfg` over `devices` (default: all of them).

    Raises:
      UserError: when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    given = {axis: getattr(cfg, axis) for axis in AXES}
    sizes, count = list(given.values()), len(devices)
    if sizes.count(-1) > 1 or any(size < -1 or not size for size in sizes):
        raise UserError(
            f"config.mesh is {given}: sizes are positive, and at most one of them is -1"
        )
    fixed = math.prod(size for size in sizes if size > 0)
    sizes = [count // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != count:
        raise UserError(
            f"config.mesh is {given}, which does not divide the {count} devices here: "
            f"the product must be {count}"
        )
    return Mesh(_arrange(devices, sizes), AXES)


def unused_gpu() -> str:
    """A warning where JAX computes on CPUs only beside an NVIDIA GPU; else ""."""
    asked = jax.config.jax_platforms or jax.default_backend() != "cpu"
    if asked or not (shutil.which("nvidia-smi") or any(map(os.path.exists, _NVIDIA))):
        return ""
    return (
        "warning: there is an NVIDIA GPU, but this JAX computes on CPUs only: "
        "pip install --editable '.[cuda]' (or set JAX_PLATFORMS=cpu)"
    )


def _arrange(devices: Sequence[jax.Device], sizes: list[int]) -> np.ndarray:
    """The devices in the mesh's shape; on TPUs the axes follow their links.

    TPU slices, which a slower network joins, divide the data axis: it exchanges
    gradients once a step and nothing else.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh.data is {sizes[0]}, which does not divide over {slices} "
            f"slices: use a multiple of {slices}"
        )
    inside, between = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1]
    return mesh_utils.create_hybrid_device_mesh(
        inside, between, devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp, for arrays of any rank."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def on_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays, or their shapes, as abstract arrays with their rows over the mesh."""
    rows = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree
    )


def row_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_of_process(batch_size: int, mesh: Mesh, process_index: int) -> np.ndarray:
    """Indices of the batch rows on the devices of a process, `[n]` int64, ascending.

    They need not be adjacent, because axes follow a slice's links and not its hosts.
    Hosts that split the pixels or weights of an example hold the same rows.
    """
    shards = mesh.devices.reshape(row_shards(mesh), -1)
    local = [any(d.process_index == process_index for d in shard) for shard in shards]
    return np.flatnonzero(np.repeat(local, batch_size // len(shards)))


def check_batch_size(
    batch_size: int, mesh: Mesh, name: str, microbatches: int = 1
) -> None:
    """Raises `UserError`, with the key `name`, unless shards get equal microbatches."""
    ways = row_shards(mesh) * microbatches
    if batch_size % ways:
        near = max(ways, batch_size // ways * ways)
        parts = f", {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(
            f"config.{name} is {batch_size}, which does not divide over {ways} shards "
            f"(mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}{parts}); "
            f"use a multiple of {ways}, for example {near}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state, mesh: Mesh):
    """A `NamedSharding` for every leaf: a `nn.LogicallyPartitioned` box or plain array.

    Plain arrays are replicated. So are dimensions that their mesh axis does not divide.
    Adafactor's factored moments, which lack an axis of their parameter, are split as
    its other axes are: then none is gathered.
    """

    def is_box(leaf):
        return isinstance(leaf, nn.LogicallyPartitioned)

    def name(path):
        return tuple(key for key in path if isinstance(key, DictKey))

    leaves = jax.tree.leaves_with_path(abstract_state, is_leaf=is_box)
    boxes = [(name(path), leaf) for path, leaf in leaves if is_box(leaf)]
    wholes = {
        key: leaf.value.shape
        for key, leaf in boxes
        if len(leaf.names) == len(leaf.value.shape)
    }

    def sharding(path, leaf):
        if not is_box(leaf):
            return replicated(mesh)
        names, shape = leaf.names, leaf.value.shape
        if len(names) != len(shape):
            whole = wholes.get(name(path), ())
            axis = _missing(shape, whole, GetAttrKey("v_row") in path)
            if axis is None:
                return replicated(mesh)
            names = (*names[:axis], *names[axis + 1 :])
        return NamedSharding(mesh, _spec(names, shape, mesh))

    return jax.tree.map_with_path(sharding, abstract_state, is_leaf=is_box)


def _missing(shape: tuple, whole: tuple, last: bool) -> int | None:
    """The axis without which `whole` is `shape`; of several, the first or the last."""
    axes = [i for i in range(len(whole)) if whole[:i] + whole[i + 1 :] == shape]
    return axes[-1 if last else 0] if axes else None


def _spec(names, shape, mesh) -> PartitionSpec:
    """The mesh axes of logical axes; None for dimensions that they do not divide."""
    spec = nn.logical_to_mesh_axes(names, RULES)
    fits = [
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=True)
    ]
    return PartitionSpec(*fits)


def on_mesh(run: Callable, mesh: Mesh) -> Callable:
    """`run`, ready to be jitted: the layers that it calls know the mesh."""

    @functools.wraps(run)
    def inside(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*args)

    return inside


def split_rows(x: jax.Array) -> jax.Array:
    """`x` with the rows of the batch on data and fsdp.

    The pixel rows of images `[B, H, W, C]` lie on spatial; of all other axes the
    compiler decides. Without this constraint XLA may split channels and gather the
    activations of the whole batch. Outside `on_mesh`, and when the rows do not divide,
    nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2:
        return x
    if x.ndim == 4 and mesh.shape["spatial"] > 1:
        spec = image_spec(x.shape, mesh)
    elif x.shape[0] % row_shards(mesh):
        return x
    else:
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        spec = PartitionSpec(("data", "fsdp"), *free)
    return jax.lax.with_sharding_constraint(x, spec)


def image_spec(
    shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh, multiple: int = 1
) -> PartitionSpec:
    """Sharding of images `[B, H, W, C]`: B on data and fsdp, H on spatial.

    An axis that does not divide is whole; H divides into multiples of `multiple`.
    """
    batch = None if shape[0] % row_shards(mesh) else ("data", "fsdp")
    height = None if shape[1] % (mesh.shape["spatial"] * multiple) else "spatial"
    return PartitionSpec(batch, height, None, None)


def gather_fsdp(weight: jax.Array, names: Sequence[str]) -> jax.Array:
    """A weight gathered over fsdp, where it is used; tensor still splits it.

    Its gradient is split over fsdp again, so each device sums over the batch only its
    own part. Outside `on_mesh` nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2:
        return weight
    rest, shape = [None if name == "in" else name for name in names], weight.shape
    return _gather(weight, _spec(rest, shape, mesh), _spec(names, shape, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight, whole, split):
    # Split as its parameter is, or it might be gathered before it was cast.
    weight = jax.lax.with_sharding_constraint(weight, split)
    return jax.lax.with_sharding_constraint(weight, whole)


def _gather_forward(weight, whole, split):
    return _gather(weight, whole, split), None


def _gather_backward(whole, split, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)
