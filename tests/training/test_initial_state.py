"""What a run starts from: in which order, and what is said when it does not fit."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.export import export
from imagen_jax.sharding import make_mesh
from imagen_jax.training import initial_state as start_lib
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.initial_state import check_fit, first_state, open_weights
from imagen_jax.training.state import abstract_state
from tests import tiny

CFG = tiny.stage(model=tiny.ONE_LEVEL)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


# Compiled once; no step is taken from what it returns, so nothing is donated.
create_state = functools.cache(start_lib.create_state)


@pytest.fixture(autouse=True)
def created_once(monkeypatch):
    monkeypatch.setattr(start_lib, "create_state", create_state)


@pytest.fixture(scope="module")
def other(tmp_path_factory, mesh):
    """Another run's workdir, and its average at step 7."""
    workdir = tmp_path_factory.mktemp("other")
    (workdir / "config.json").write_text("{}")
    state = create_state(CFG, mesh)
    ema = jax.tree.map(lambda leaf: leaf + 0.5, state.ema)
    checkpointer = Checkpointer(str(workdir), CFG.training)
    checkpointer.save(state.replace(step=jax.numpy.int32(7), ema=ema), CFG, b"")
    checkpointer.close()
    return workdir, jax.device_get(ema)


def start(workdir, mesh, cfg=CFG, init_from=""):
    training = dataclasses.replace(cfg.training, init_from=str(init_from))
    cfg = dataclasses.replace(cfg, training=training)
    checkpointer = Checkpointer(str(workdir), training)
    positions = []
    try:
        state, origin = first_state(cfg, mesh, checkpointer, positions.append)
        return state, origin, positions
    finally:
        checkpointer.close()


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_its_own_checkpoint_comes_first_then_named_weights(tmp_path, mesh, other):
    workdir, ema = other
    scratch, origin, positions = start(tmp_path, mesh)
    assert origin == {"source": "scratch"} and not positions
    assert_equal(scratch, create_state(CFG, mesh))

    warm, origin, positions = start(tmp_path, mesh, init_from=workdir)
    assert origin == {
        "source": str(workdir),
        "source_step": 7,
        "source_differs": [],
    }
    assert_equal(warm.params, ema)
    assert_equal(warm.ema, ema)
    # The rest is a new run's, and nothing is donated twice.
    assert_equal((warm.step, warm.opt_state), (scratch.step, scratch.opt_state))
    leaves = jax.tree.leaves((warm.params, warm.ema))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)

    checkpointer = Checkpointer(str(tmp_path), CFG.training)
    checkpointer.save(scratch.replace(step=jax.numpy.int32(2)), CFG, b"here")
    checkpointer.close()
    own, origin, positions = start(tmp_path, mesh, init_from=workdir)
    assert origin == {"source": "checkpoint"} and positions == [b"here"]
    assert int(own.step) == 2
    assert_equal(own.params, scratch.params)


def test_exported_weights_are_the_same_to_the_bit(tmp_path, mesh, other):
    """Through a folder, through several files, through one file, and on any mesh."""
    workdir, ema = other
    export(str(workdir), str(tmp_path / "one"), 10**9)
    export(str(workdir), str(tmp_path / "many"), 8_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    eight = make_mesh(MeshConfig(fsdp=4, tensor=2))
    for source, step in (("one", 7), ("many", 7), ("one/model.safetensors", None)):
        weights = open_weights(str(tmp_path / source))
        check_fit(weights, CFG, "test")
        assert weights.step == step
        for place in (mesh, eight):
            params = weights.load(abstract_state(CFG, place).ema)
            assert_equal(params, ema)
    assert params["conv_in"]["kernel"].sharding.mesh == eight
    warm, origin, _ = start(tmp_path / "run", mesh, init_from=tmp_path / "many")
    assert_equal(warm.ema, ema)
    assert origin["source"] == str(tmp_path / "many")


def test_what_differs_is_named(tmp_path, mesh, other):
    workdir, _ = other
    wide = tiny.stage(
        model={**tiny.ONE_LEVEL, "channels": (16,), "num_res_blocks": (2,)}
    )
    with pytest.raises(UserError) as found:
        start(tmp_path, mesh, wide, workdir)
    message = str(found.value)
    assert f"parameters of {workdir} do not fit this stage" in message
    assert "config.model.channels: (8,) -> (16,)" in message
    assert "config.model.num_res_blocks: (1,) -> (2,)" in message
    assert "missing there: " in message and "of another shape: " in message
    assert "conv_in.bias: (8,) there, (16,) here" in message
    assert message.count("there, ") == 3 and ", ..." in message

    narrow = tiny.stage(model={**tiny.ONE_LEVEL, "text_norm": False})
    with pytest.raises(UserError, match="only there: "):
        start(tmp_path, mesh, narrow, workdir)
    export(str(workdir), str(tmp_path / "out"), 10**9)
    file = tmp_path / "out/model.safetensors"
    with pytest.raises(UserError, match=r"or change config\.model to theirs"):
        start(tmp_path / "run", mesh, wide, file)


def test_other_text_or_process_is_written_down(tmp_path, mesh, other):
    workdir, _ = other
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL,
        text={"encoder": "other@1"},
        diffusion={"prediction": "v"},
    )
    _, origin, _ = start(tmp_path, mesh, cfg, workdir)
    assert origin["source_differs"] == [
        "diffusion.prediction: 'eps' -> 'v'",
        "text.encoder: 'fake@1' -> 'other@1'",
    ]


def test_no_weights_there(tmp_path, mesh):
    with pytest.raises(UserError, match="is no training workdir"):
        start(tmp_path / "run", mesh, init_from=tmp_path / "none")
