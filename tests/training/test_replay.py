"""Bundles of bad steps, their replay, and what a run does when its budget is spent."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import batch_sharding, make_mesh
from imagen_jax.training import loop, replay
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import create_state
from tests import tiny
from tests.training.checkpoints import assert_equal, truncate

CFG = tiny.stage(
    model=tiny.ONE_LEVEL,
    # No caption that a test has spoilt is dropped.
    diffusion={"text_dropout": 0.0},
    training={
        "skip_budget_steps": 2,
        "spike_factor": 10.0,
        "log_every_steps": 2,
        "steps": 12,
    },
)


@functools.cache
def compiled(make, microbatches, mesh):
    training = dataclasses.replace(CFG.training, microbatches=microbatches)
    return make(dataclasses.replace(CFG, training=training), mesh)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """No program depends on how long a run is, or on what it does at its end."""
    step_fn, examine = loop.compile_train_step, replay.compile_examine
    with pytest.MonkeyPatch.context() as patch:
        for module, make in ((loop, step_fn), (replay, examine)):
            patch.setattr(
                module,
                make.__name__,
                lambda cfg, mesh, *_, make=make: compiled(
                    make, cfg.training.microbatches, mesh
                ),
            )
        yield


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


class Batches(tiny.Batches):
    """Whose n-th batch, counted from 1, has NaN in an example's text for n in `bad`."""

    def __init__(self, cfg, mesh, bad=()):
        super().__init__(cfg, mesh)
        self.bad = bad

    def __next__(self):
        found = super().__next__()
        if self.taken in self.bad:
            found = jax.device_get(found)
            text = found.text.copy()
            text[3, 0, 0] = np.nan
            found = found.replace(text=text)
        return jax.device_put(found, batch_sharding(self.mesh))


def learned(state):
    return state.params, state.ema, state.opt_state


@pytest.fixture(scope="module")
def eight():
    return make_mesh(MeshConfig(fsdp=2))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, mesh):
    """A run of which steps 3, 6 and 7 are bad: `(workdir, message)`."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.raises(UserError) as caught:
        loop.train(CFG, str(workdir), Batches(CFG, mesh, (3, 6, 7)), mesh)
    return workdir, str(caught.value)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_spent_budget_stops_with_a_bundle(stopped, mesh):
    workdir, message = stopped
    assert (
        "stopped at step 7" in message and "(loss nan, gradient norm nan; " in message
    )
    assert "first not finite: the text embeddings of example 51" in message
    assert "newest checkpoint: 6)" in message
    assert f"--replay={workdir}/bundles/7" in message
    events = lines(workdir / "events.jsonl")
    assert events[-1]["event"] == "budget_spent" and events[-1]["step"] == 7
    record = json.loads((workdir / "bundles" / "7" / "bundle.json").read_text())
    assert [e["id"] for e in record["found"]["examples"]] == list(range(48, 56))
    assert record["recorded"] == {"loss": "nan", "gradient_norm": "nan"}
    # Of lines of metrics only good steps are in the means; 7 is the last of them.
    metrics = {row["step"]: row for row in lines(workdir / "metrics.jsonl")}
    assert sorted(metrics) == [2, 4, 6, 7]
    assert [metrics[s]["skipped_updates"] for s in (2, 4, 6, 7)] == [0, 1, 2, 3]
    assert "loss" not in metrics[7] and math.isfinite(metrics[4]["loss"])
    # What the run had learned, of five good steps, is in the replay.
    kept, _ = Checkpointer(str(workdir / "bundles" / "7")).restore(CFG, mesh, 6)
    saved, _ = Checkpointer(str(workdir)).restore(CFG, mesh, 6)
    assert_equal(learned(jax.device_get(kept)), learned(jax.device_get(saved)))
    assert (int(kept.step), int(kept.guard.skipped)) == (6, 2)
    # The count comes back with a checkpoint.
    assert int(saved.guard.skipped) == 2


def test_a_bundle_names_the_first_layer(stopped, mesh, capsys):
    workdir, _ = stopped
    replay.print_replay(str(workdir / "bundles" / "7"))
    told = capsys.readouterr().out
    assert "step 7" in told and "the numbers agree" in told
    assert "first not finite: the text embeddings of example 51" in told


@pytest.mark.slow
def test_one_device_gives_the_numbers_of_eight(tmp_path, eight):
    """A run of spikes: they are finite, so that there is something to compare.

    Float32, sums in another order: 1e-5 relative.
    """
    state = create_state(CFG, eight)
    low = {"loss": state.guard.loss + 0.01, "averaged": state.guard.averaged + 100}
    loop.claim_workdir(CFG, str(tmp_path / "run"))
    checkpointer = Checkpointer(str(tmp_path / "run"), CFG.training)
    state = state.replace(guard=state.guard.replace(**low))
    checkpointer.save(state, CFG, b"0")
    checkpointer.close()
    with pytest.raises(UserError, match="first not finite: nothing;"):
        loop.train(CFG, str(tmp_path / "run"), Batches(CFG, eight), eight)
    folder = tmp_path / "run" / "bundles" / "2"
    record, found = replay.replay(str(folder))
    # A network that was never updated answers 0: the loss is the noise's variance, the
    # mean of 8 * 192 squares of normals.
    assert record["recorded"]["loss"] == pytest.approx(1, abs=5 * (2 / 1536) ** 0.5)
    for name, value in record["recorded"].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    assert replay.first_not_finite(found) == ""
    for there, here in zip(record["found"]["examples"], found["examples"], strict=True):
        assert there["id"] == here["id"]
        for name in ("logsnr", "loss", "text"):
            np.testing.assert_allclose(there[name], here[name], rtol=1e-5)
    # In the order of the passes.
    layers, gradients = list(found["layers"]), list(found["gradients"])
    assert layers.index("conv_in") < layers.index("conv_out")
    where = [gradients.index(f"{name}/kernel") for name in ("conv_out", "conv_in")]
    assert where == sorted(where)


@pytest.mark.slow
def test_what_is_named_is_where_it_begins(stopped, mesh):
    """A parameter, a layer that overflows, a loss, a gradient norm that do."""
    kept, _ = Checkpointer(str(stopped[0] / "bundles" / "7")).restore(CFG, mesh, 6)
    good = jax.device_get(kept)
    batch = jax.device_put(tiny.batch(CFG), batch_sharding(mesh))

    def cause(name, value, everywhere=False):
        params = jax.tree.map(np.copy, good.params)
        params[name]["bias"][slice(None if everywhere else 1)] = value
        if everywhere:
            params[name]["kernel"][...] = value
        found = replay.examine(good.replace(params=params), batch, CFG, mesh)
        return replay.first_not_finite(found)

    assert cause("conv_in", np.nan) == "the parameter conv_in/bias"
    assert cause("conv_in", 1.0) == ""
    # Its square overflows in the normalisation that comes next.
    assert cause("conv_in", 1e30).startswith("the output of layer down_0_first/")
    assert cause("conv_out", 1e25, True) == "the loss of example 0"
    assert "gradient" in cause("conv_out", 1e15, True)


@pytest.mark.slow
def test_a_rollback_goes_on_with_what_comes_next(tmp_path, mesh):
    """The checkpoint's parameters, the data and the step after the bad ones."""
    cfg = dataclasses.replace(
        CFG, training=dataclasses.replace(CFG.training, on_spent_budget="rollback")
    )
    cfg = tiny.with_steps(cfg, 5)
    batches = Batches(cfg, mesh, (3, 4))
    last = jax.device_get(loop.train(cfg, str(tmp_path), batches, mesh))
    assert batches.taken == 5 and (last.step, last.updates) == (5, 3)
    events = lines(tmp_path / "events.jsonl")
    assert [(e["action"], e["step"]) for e in events if "action" in e] == [
        ("rollback", 4)
    ]
    # By hand: two good steps, then the fifth.
    step_fn = loop.compile_train_step(cfg, mesh)
    state = create_state(cfg, mesh)
    for number in (0, 1, 4):
        if number == 4:
            guard = state.guard.replace(skipped=np.int32(2))
            state = state.replace(step=state.step + 2, guard=guard)
        batch = jax.device_put(tiny.batch(cfg, number), batch_sharding(mesh))
        state, _ = step_fn(state, batch)
    assert_equal(learned(last), learned(state))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "should hold the record of a bundle"),
        (lambda f: truncate(f / "bundle.json"), "is not the record of a bundle"),
        (
            lambda f: (f / "bundle.json").write_text("{}"),
            "has schema version None, not 1",
        ),
        (
            lambda f: (f / "batch.npz").unlink(),
            "batch.npz' is not the batch of a bundle",
        ),
        (lambda f: truncate(f / "batch.npz"), "batch.npz' .* or is damaged"),
        (lambda f: shutil.rmtree(f / "checkpoints"), "checkpoint"),
        (lambda f: shutil.rmtree(f / "checkpoints/6/train"), "train.* is missing"),
    ],
)
def test_a_damaged_bundle_is_refused(stopped, tmp_path, damage, message):
    folder = tmp_path / "bundle"
    shutil.copytree(stopped[0] / "bundles" / "7", folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        replay.replay(str(folder))
