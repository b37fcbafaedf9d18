"""The device mesh, and which mesh axis each logical axis of an array lies on."""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError

# Neighbours on the last axes are neighbours in the machine: they exchange the most.
AXES = ("data", "fsdp", "spatial", "tensor")

# Parameters are declared with these names; `None` is replicated. Weights are split
# along their input over fsdp and along their output over tensor.
RULES = (
    ("batch", ("data", "fsdp")),
    ("kernel_h", None),
    ("kernel_w", None),
    ("in", "fsdp"),
    ("out", "tensor"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("norm", None),
    ("vocab", "tensor"),
    ("buckets", None),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `cfg` over `devices` (default: all of them).

    Raises:
      UserError: when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(cfg, axis) for axis in AXES]
    given = dict(zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(
            f"config.mesh is {given}: sizes are positive, and at most "
            "one of them is -1 (all devices that are left)"
        )
    fixed = math.prod(s for s in sizes if s > 0)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UserError(
            f"config.mesh is {given}, which does not divide the "
            f"{len(devices)} devices here; the product must be {len(devices)}, and "
            f"an axis can be one of {_divisors(len(devices))}"
        )
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    return Mesh(_arranged(devices, sizes), AXES)


def _arranged(devices: Sequence[jax.Device], sizes: list[int]) -> np.ndarray:
    """The devices in the mesh's shape; a TPU's so that axes follow its links.

    Slices that are joined by a data centre's network are parts of the data axis, which
    exchanges gradients once a step and nothing else.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh.data is {sizes[0]}, which does not divide over {slices} "
            f"slices: use a multiple of {slices}"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_hybrid_device_mesh(
        [sizes[0] // slices, *sizes[1:]],
        [slices, *([1] * (len(sizes) - 1))],
        devices,
        allow_split_physical_axes=True,
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp; valid for an array of any rank."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def row_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Over how many shards the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_of_process(batch_size: int, mesh: Mesh, process_index: int) -> np.ndarray:
    """Which rows of a batch the devices of a process hold, `[n]` int64, ascending.

    They need not be neighbours, as axes follow a slice's links and not its hosts, and
    hosts that share an example's pixels or weights hold the same rows.
    """
    shards = mesh.devices.reshape(row_shards(mesh), -1)
    held = [any(d.process_index == process_index for d in shard) for shard in shards]
    return np.flatnonzero(np.repeat(held, batch_size // len(shards)))


def check_batch_size(
    batch_size: int, mesh: Mesh, name: str, microbatches: int = 1
) -> None:
    """Raises `UserError` unless microbatches divide over the mesh's data and fsdp."""
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
    """A `NamedSharding` for every leaf of a tree of (boxed) abstract arrays.

    Leaves are `nn.LogicallyPartitioned` boxes or plain arrays; plain ones are
    replicated. A dimension that its mesh axis does not divide is replicated too.
    """

    def one(leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        if len(leaf.names) != len(leaf.value.shape):
            # Adafactor's factored moments lack an axis of their parameter; they are
            # vectors, small enough to replicate.
            return replicated(mesh)
        return NamedSharding(mesh, _spec(leaf.names, leaf.value.shape, mesh))

    return jax.tree.map(
        one, abstract_state, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def _spec(names, shape, mesh) -> PartitionSpec:
    """The mesh axes of logical axes, but for dimensions that they do not divide."""
    spec = nn.logical_to_mesh_axes(names, RULES)
    fits = [
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=True)
    ]
    return PartitionSpec(*fits)


def on_mesh(run: Callable, mesh: Mesh) -> Callable:
    """`run`, to be jitted: what it calls of this file and attention know the mesh."""

    @functools.wraps(run)
    def inside(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*args)

    return inside


def split_rows(x: jax.Array) -> jax.Array:
    """`x` with its rows on data and fsdp; of the other axes the compiler decides.

    Pixels' rows of pictures `[B, H, W, C]` are on spatial. Without it XLA may split
    channels and gather activations of the whole batch. Outside of `on_mesh`, and for
    rows that do not divide, it changes nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2:
        return x
    if x.ndim == 4 and mesh.shape["spatial"] > 1:
        spec = picture_spec(x.shape, mesh)
    elif x.shape[0] % row_shards(mesh):
        return x
    else:
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        spec = PartitionSpec(("data", "fsdp"), *free)
    return jax.lax.with_sharding_constraint(x, spec)


def picture_spec(
    shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh, multiple: int = 1
) -> PartitionSpec:
    """Where pictures `[B, H, W, C]` lie: each on data and fsdp, its rows on spatial.

    What does not divide is whole; of H each device gets a multiple of `multiple`.
    """
    batch = None if shape[0] % row_shards(mesh) else ("data", "fsdp")
    height = None if shape[1] % (mesh.shape["spatial"] * multiple) else "spatial"
    return PartitionSpec(batch, height, None, None)


def gather_fsdp(weight: jax.Array, names: Sequence[str]) -> jax.Array:
    """A weight whole over fsdp, where it is used; split over tensor as it was.

    Its gradient is split over fsdp again: each device needs the sum over the batch
    for its own part only. Outside of `on_mesh` it changes nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2:
        return weight
    rest = [None if name == "in" else name for name in names]
    return _gather(
        weight, _spec(rest, weight.shape, mesh), _spec(names, weight.shape, mesh)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight, whole, split):
    return jax.lax.with_sharding_constraint(weight, whole)


def _gather_forward(weight, whole, split):
    return _gather(weight, whole, split), None


def _gather_backward(whole, split, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)
