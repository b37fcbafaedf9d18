"""Meshes of eight devices, and where parameters lie on them."""

import contextlib
import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec

from imagen_jax import config, sharding
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.planning.chips import slice_devices
from imagen_jax.planning.compile import compile_step
from imagen_jax.training.state import abstract_state
from tests import tiny


def _mesh(**axes):
    return sharding.make_mesh(MeshConfig(**axes))


@pytest.mark.parametrize(
    ("axes", "want"),
    [
        ({}, (8, 1, 1, 1)),
        ({"data": 8}, (8, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 1, 2)),
        ({"data": 1, "spatial": 4, "tensor": 2}, (1, 1, 4, 2)),
    ],
)
def test_the_mesh_takes_all_devices(axes, want):
    mesh = _mesh(**axes)
    assert mesh.axis_names == ("data", "fsdp", "spatial", "tensor")
    assert tuple(mesh.shape.values()) == want
    assert list(mesh.devices.flat) == jax.devices()


def test_a_mesh_of_some_devices():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[2:3])
    assert list(mesh.devices.flat) == jax.devices()[2:3]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": -1}, "at most one of them is -1"),
        ({"fsdp": 0}, "sizes are positive"),
        ({"tensor": -2}, "sizes are positive"),
        ({"fsdp": 3}, "'fsdp': 3.* 8 devices here: the product must be 8"),
        ({"data": 4}, "the product must be 8"),
        ({"data": 8, "fsdp": 2}, "does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(UserError, match=message):
        _mesh(**axes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What tells JAX where a chip of a TPU is."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0


def _chips(slices):
    places = [(x, y, 0) for y in range(4) for x in range(4)]
    return [
        Chip(16 * part + i, place, part)
        for part in range(slices)
        for i, place in enumerate(places)
    ]


def test_a_meshs_neighbours_are_a_slices_neighbours():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), _chips(1))
    for row in mesh.devices[:, :, 0, 0]:
        x, y, _ = zip(*(chip.coords for chip in row), strict=True)
        assert len(set(x)) == 1 or len(set(y)) == 1 or (max(x) - min(x) == 1)


def test_slices_are_parts_of_the_data_axis():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8), _chips(2))
    assert mesh.devices.shape == (4, 8, 1, 1)
    slices = [{chip.slice_index for chip in row.flat} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="data is 1, .* over 2 slices"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=32), _chips(2))


def test_rows_of_a_process():
    """Eight chips of four hosts that axes cross, or that hold examples together."""

    def rows(mesh, batch_size=8):
        return [
            sharding.rows_of_process(batch_size, mesh, process).tolist()
            for process in range(4)
        ]

    def mesh(order, *shape):
        hosts = [Chip(i, (i, 0, 0), process_index=p) for i, p in enumerate(order)]
        return Mesh(np.array(hosts, object).reshape(shape), sharding.AXES)

    straight = [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows(mesh(straight, 4, 2, 1, 1)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    crossed = mesh([0, 1, 0, 1, 2, 3, 2, 3], 8, 1, 1, 1)
    assert rows(crossed) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert rows(crossed, 16)[1] == [2, 3, 6, 7]
    assert rows(mesh(straight, 2, 1, 1, 4)) == [[*range(4)]] * 2 + [[*range(4, 8)]] * 2
    assert rows(mesh(straight, 1, 2, 4, 1), 2) == [[0], [0], [1], [1]]


def test_check_batch_size():
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    sharding.check_batch_size(12, mesh, "training.batch_size")
    for size, near in [(13, 12), (3, 4)]:
        with pytest.raises(UserError) as error:
            sharding.check_batch_size(size, mesh, "training.batch_size")
        assert f"config.training.batch_size is {size}" in str(error.value)
        assert f"a multiple of 4, for example {near}" in str(error.value)
    with pytest.raises(UserError, match="over 12 shards .* 3 microbatches.* 12$"):
        sharding.check_batch_size(16, mesh, "training.batch_size", microbatches=3)


def test_rows_of_a_batch_lie_on_data_and_fsdp():
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    for shape in [(8,), (8, 3), (8, 4, 4, 3)]:
        array = jax.device_put(np.zeros(shape), sharding.batch_sharding(mesh))
        assert {s.data.shape for s in array.addressable_shards} == {(2, *shape[1:])}


def _leaf(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("shape", "names", "want"),
    [
        ((16, 8), ("in", "out"), ("fsdp", "tensor")),
        ((3, 3, 16, 8), ("kernel_h", "kernel_w", "in", "out"), (2, "fsdp", "tensor")),
        ((16, 2, 8), ("in", "heads", "head_dim"), ("fsdp", "tensor", None)),
        ((8,), ("norm",), (None,)),
        ((10, 6), ("vocab", "in"), ("tensor", None)),  # 6 is no multiple of 4
        ((6, 8), ("in", "out"), (None, "tensor")),
        ((16, 7), ("in", "out"), ("fsdp", None)),
    ],
)
def test_parameters_lie_as_the_rules_say(shape, names, want):
    want = (None, None, *want[1:]) if want[0] == 2 else want
    mesh = _mesh(data=1, fsdp=4, tensor=2)
    made = sharding.state_shardings({"leaf": _leaf(shape, *names)}, mesh)["leaf"]
    assert made.mesh == mesh
    assert tuple(made.spec) == want
    array = jax.device_put(np.zeros(shape, np.float32), made)
    ways = {"fsdp": 4, "tensor": 2, None: 1}
    local = tuple(n // ways[axis] for n, axis in zip(shape, want))
    assert {s.data.shape for s in array.addressable_shards} == {local}


def test_plain_leaves_are_replicated():
    mesh = _mesh(data=1, fsdp=4, tensor=2)
    plain = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    made = sharding.state_shardings({"plain": plain, "step": plain}, mesh)
    assert {s.spec for s in made.values()} == {PartitionSpec()}
    assert sharding.replicated(mesh).spec == PartitionSpec()


@pytest.mark.parametrize(
    ("shape", "row", "column"),
    [
        # optax: rows lack the largest side, columns the second largest; of equal sides
        # the later counts as larger.
        ((3, 3, 128, 256), (None, None, "fsdp"), (None, None, "tensor")),
        ((3, 3, 256, 128), (None, None, "tensor"), (None, None, "fsdp")),
        ((3, 3, 128, 128), (None, None, "fsdp"), (None, None, "tensor")),
        ((3, 3, 130, 128), (None, None, "tensor"), (None, None, None)),
        ((3, 3, 8, 8), (), ()),  # not factored: placeholders
    ],
)
def test_factored_moments_lie_as_their_parameter(shape, row, column):
    mesh = _mesh(data=1, fsdp=4, tensor=2)
    params = {"kernel": _leaf(shape, "kernel_h", "kernel_w", "in", "out")}
    moments = jax.eval_shape(optax.adafactor(1e-3).init, params)
    _, (made, *_) = sharding.state_shardings((params, moments), mesh)
    assert made.v_row["kernel"].spec == PartitionSpec(*row)
    assert made.v_col["kernel"].spec == PartitionSpec(*column)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["unet", "efficient_unet"])
def test_fsdp_and_tensor_divide_a_network(architecture):
    """All but small vectors: each device holds little more than its share."""
    cfg = config.from_dict(
        {
            "image_size": 64,
            "lowres_size": 16,
            "model": {"architecture": architecture, "channels": (128, 256, 256, 256)},
            "text": {"length": 4, "dim": 64},
        }
    )
    params = jax.eval_shape(lambda: network.init(cfg, jax.random.key(0)))
    made = sharding.state_shardings(params, _mesh(data=1, fsdp=4, tensor=2))
    leaves = jax.tree.leaves(nn.unbox(params))
    assert len(jax.tree.leaves(made)) == len(leaves)
    local = sum(
        np.prod(one.shard_shape(leaf.shape))
        for one, leaf in zip(jax.tree.leaves(made), leaves)
    )
    total = sum(np.prod(leaf.shape) for leaf in leaves)
    assert total / 8 <= local < 1.03 * total / 8


@pytest.mark.slow
def test_between_slices_go_sums_of_gradients_only():
    """A step compiled for two slices of four: each chip sends its own part of them."""
    pytest.importorskip("libtpu")
    slice_devices("v4-8")
    pair = topologies.get_topology_desc(
        platform="tpu",
        topology_name="v4:2x2x1",
        chips_per_host_bounds=(2, 2, 1),
        num_slices=2,
        chip_config_name="megacore",
    )
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), list(pair.devices))
    cfg = tiny.stage(model={**tiny.ONE_LEVEL, "channels": (128,)})
    text = compile_step(cfg, mesh)[0].as_text()
    # The program is one slice's: what goes to the other is sent by the hosts.
    assert set(re.findall(r"replica_groups=(\S+),", text)) == {"{{0,1,2,3}}"}
    shapes = re.findall(r"= \(f32\[([\d,]+)\]\S*, .*\) send\(", text)
    sent = sum(math.prod(map(int, shape.split(","))) for shape in shapes)
    parts = jax.tree.leaves(abstract_state(cfg, mesh).params)
    own = sum(math.prod(part.sharding.shard_shape(part.shape)) for part in parts)
    # Arrays of few channels are sent as tiles of 128; the loss and norms besides.
    assert own <= sent < 1.05 * own


@pytest.mark.parametrize("sign", ["nvidia-smi", "/dev/nvidia0", "/proc/driver/nvidia"])
def test_a_gpu_that_jax_does_not_use_is_told(sign, monkeypatch):
    """On a machine that has one of the signs of NVIDIA's driver."""
    here = [sign]
    monkeypatch.setattr(sharding.os.path, "exists", lambda path: path in here)
    monkeypatch.setattr(sharding.shutil, "which", lambda name: name in here)
    with jax_platforms(None):
        told = sharding.unused_gpu()
        assert "pip install --editable '.[cuda]'" in told and "\n" not in told
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert not sharding.unused_gpu()
        monkeypatch.undo()
        here.clear()
        monkeypatch.setattr(sharding.os.path, "exists", lambda path: False)
        monkeypatch.setattr(sharding.shutil, "which", lambda name: None)
        assert not sharding.unused_gpu()
    with jax_platforms("cpu"):  # who asks for CPUs knows
        assert not sharding.unused_gpu()


@contextlib.contextmanager
def jax_platforms(value):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", value)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)
