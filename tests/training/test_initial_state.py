"""What a run starts from: in which order, and what is said when it does not fit."""

import contextlib
import dataclasses
import functools

import jax
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.export import export
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.loop import first_state
from imagen_jax.training.state import abstract_state
from imagen_jax.training.weights import open_weights
from tests import tiny
from tests.training.checkpoints import CFG, assert_equal, mesh, save, state

# Compiled once; no step is taken from what it returns, so nothing is donated.
create_state = functools.cache(loop.create_state)


@pytest.fixture(autouse=True)
def created_once(monkeypatch):
    monkeypatch.setattr(loop, "create_state", create_state)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The workdir of another run, with a checkpoint of step 7."""
    workdir = tmp_path_factory.mktemp("other")
    (workdir / "config.json").write_text("{}")
    save(workdir, [7])
    return workdir


def start(workdir, cfg=CFG, init_from=""):
    training = dataclasses.replace(cfg.training, init_from=str(init_from))
    cfg = dataclasses.replace(cfg, training=training)
    positions = []
    with contextlib.closing(Checkpointer(str(workdir), training)) as checkpointer:
        found, origin, _ = first_state(cfg, mesh(), checkpointer, positions.append)
    return found, origin, positions


@pytest.mark.slow
def test_its_own_checkpoint_comes_first_then_named_weights(tmp_path, other):
    scratch, origin, positions = start(tmp_path)
    assert origin == {"source": "scratch"} and not positions
    assert_equal(scratch, create_state(CFG, mesh()))

    warm, origin, positions = start(tmp_path, init_from=other)
    assert origin == {"source": str(other), "source_step": 7, "source_differs": []}
    assert_equal(warm.params, state(7).ema)
    assert_equal(warm.ema, state(7).ema)
    # The rest is a new run's, and nothing is donated twice.
    assert_equal((warm.step, warm.opt_state), (scratch.step, scratch.opt_state))
    leaves = jax.tree.leaves((warm.params, warm.ema))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)

    save(tmp_path, [2])
    own, origin, positions = start(tmp_path, init_from=other)
    assert origin == {"source": "checkpoint"} and positions == [b"at 2"]
    assert_equal(own, state(2))


def test_a_damaged_checkpoint_is_told_to_the_log(tmp_path):
    save(tmp_path, [1, 2])
    (tmp_path / "checkpoints/2/config/metadata").unlink()
    own, origin, positions = start(tmp_path)
    assert origin["damaged"] == {"2": "config/metadata is missing"}
    assert int(own.step) == 1 and positions == [b"at 1"]


def test_exported_weights_are_the_same_to_the_bit(tmp_path, other):
    """Through a folder, through several files, through one file, and on any mesh."""
    export(str(other), str(tmp_path / "one"), 10**9)
    export(str(other), str(tmp_path / "many"), 8_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    eight = make_mesh(MeshConfig(fsdp=4, tensor=2))
    for source, step in (("one", 7), ("many", 7), ("one/model.safetensors", None)):
        weights = open_weights(str(tmp_path / source))
        weights.check_fit(CFG, "test")
        assert weights.step == step
        for place in (mesh(), eight):
            params = weights.load(abstract_state(CFG, place).ema)
            assert_equal(params, state(7).ema)
    assert params["conv_in"]["kernel"].sharding.mesh == eight


def test_what_differs_is_named(tmp_path, other):
    wide = tiny.stage(
        model={**tiny.ONE_LEVEL, "channels": (16,), "num_res_blocks": (2,)}
    )
    with pytest.raises(UserError) as found:
        start(tmp_path, wide, other)
    message = str(found.value)
    assert f"parameters of {other} do not fit this stage" in message
    assert "config.model.channels: (8,) -> (16,)" in message
    assert "config.model.num_res_blocks: (1,) -> (2,)" in message
    assert "conv_in.bias: (8,) -> (16,)" in message
    assert message.count(") -> (") == 3 + 2 and "\n" not in message

    deep = tiny.stage(model={**tiny.ONE_LEVEL, "num_res_blocks": (2,)})
    with pytest.raises(UserError, match=r": missing -> \("):
        start(tmp_path, deep, other)
    narrow = tiny.stage(model={**tiny.ONE_LEVEL, "text_norm": False})
    with pytest.raises(UserError, match=r"\) -> none"):
        start(tmp_path, narrow, other)
    export(str(other), str(tmp_path / "out"), 10**9)
    with pytest.raises(UserError, match=r"do not fit .*here\): conv_in.bias: \("):
        start(tmp_path / "run", wide, tmp_path / "out/model.safetensors")


def test_other_text_or_process_is_written_down(tmp_path, other):
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL,
        text={"encoder": "other@1"},
        diffusion={"prediction": "v"},
    )
    _, origin, _ = start(tmp_path, cfg, other)
    assert origin["source_differs"] == [
        "diffusion.prediction: 'eps' -> 'v'",
        "text.encoder: 'fake@1' -> 'other@1'",
    ]


def test_no_weights_there(tmp_path):
    with pytest.raises(UserError, match="has no config.json: give the --workdir"):
        start(tmp_path / "run", init_from=tmp_path / "none")
