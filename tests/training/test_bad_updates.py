"""Bad numbers: skipped, counted, and after a budget a bundle."""

import dataclasses
import functools
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

from imagen_jax import train as door
from imagen_jax.batch import batch_spec
from imagen_jax.config import MeshConfig, TrainingConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import batch_sharding, make_mesh
from imagen_jax.training import bad_updates as guard
from imagen_jax.training import loop
from imagen_jax.training import replay as bundle
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import abstract_state, create_state
from tests import tiny

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
    """How long a run is and what it does at its end is in no program."""
    step_fn, examine = loop.compile_train_step, bundle.compile_examine
    with pytest.MonkeyPatch.context() as patch:
        for module, make in ((loop, step_fn), (bundle, examine)):
            patch.setattr(
                module,
                make.__name__,
                lambda cfg, mesh, make=make: compiled(
                    make, cfg.training.microbatches, mesh
                ),
            )
        yield


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def eight():
    return make_mesh(MeshConfig(fsdp=2))


def with_text(batch, value, row=3):
    """The batch with one number of one example's text replaced."""
    text = batch.text.copy()
    text[row, 0, 0] = value
    return batch.replace(text=text)


class Batches(tiny.Batches):
    """Whose n-th batch, counted from 1, has NaN in an example's text for n in `bad`."""

    def __init__(self, cfg, mesh, bad=()):
        super().__init__(cfg, mesh)
        self.bad = bad

    def __next__(self):
        found = super().__next__()
        if self.taken in self.bad:
            found = with_text(jax.device_get(found), np.nan)
        return jax.device_put(found, batch_sharding(self.mesh))


def advance(state, batch, mesh):
    """The state after a step, and its metrics, on the host; `state` stays."""
    state = jax.device_get(state)
    batch = jax.device_put(batch, batch_sharding(mesh))
    return jax.device_get(loop.compile_train_step(CFG, mesh)(state, batch))


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def learned(state):
    return state.params, state.ema, state.opt_state


@pytest.fixture(scope="module")
def good(mesh):
    """The state after one good step."""
    state, metrics = advance(create_state(CFG, mesh), tiny.batch(CFG), mesh)
    assert not metrics["skipped"] and state.updates == 1
    return state


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_not_done(good, mesh, value):
    """Bitwise, and later steps are those of a run whose step was only counted."""
    after, metrics = advance(good, with_text(tiny.batch(CFG, 1), value), mesh)
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"]
    assert_equal(learned(after), learned(good))
    assert (after.step, after.guard.skipped, after.updates) == (2, 1, 1)
    counted = good.replace(step=good.step + 1, guard=after.guard)
    later, metrics = advance(after, tiny.batch(CFG, 2), mesh)
    want, _ = advance(counted, tiny.batch(CFG, 2), mesh)
    assert_equal(later, want)
    # The step, and so the noise, is another than if there had been no bad one.
    _, earlier = advance(good, tiny.batch(CFG, 2), mesh)
    assert metrics["loss"] != earlier["loss"] and not metrics["skipped"]
    # The rate and the average's warm-up are those of the optimizer's own count.
    assert metrics["learning_rate"] == earlier["learning_rate"]


def test_what_is_kept_is_not_copied(mesh):
    """Of an array that is selected twice XLA copies the old values, for each step."""
    run = loop.compile_train_step(CFG, mesh)
    state, batch = abstract_state(CFG, mesh), batch_spec(CFG)
    program = run.lower(state, batch).compile().as_text()
    names = r"%?state_(?:params|ema|opt_state)\w*"
    assert re.search(rf"f32\[\d[\d,]*\]\S* fusion\([^)]*{names}", program)
    assert not re.findall(rf"f32\[\d[\d,]*\]\S* copy\({names}", program)


def test_a_gradient_that_overflows_is_not_done(good, mesh):
    """The loss is finite: 1e30; its gradient's norm has no float32."""
    params = jax.tree.map(np.copy, good.params)
    params["conv_out"]["bias"] += 1e15
    params["conv_out"]["kernel"] += 1e15
    state = good.replace(params=params)
    after, metrics = advance(state, tiny.batch(CFG), mesh)
    assert np.isfinite(metrics["loss"]) and np.isinf(metrics["gradient_norm"])
    assert_equal(learned(after), learned(state))


def test_a_spike_is_what_exceeds_its_average():
    """The means are plain ones of 100 updates, then decay; spikes are in none."""
    cfg = TrainingConfig(spike_factor=3.0)
    judge = jax.jit(functools.partial(guard.judge, cfg=cfg))
    now = guard.new_guard()
    rng = np.random.default_rng(0)
    losses, norms = rng.uniform(0.8, 1.2, (2, guard.AVERAGED_STEPS))
    # Before there is an average nothing exceeds it.
    losses[5] = 50.0
    for loss, norm in zip(losses, norms):
        skip, now = judge(now, np.float32(loss), np.float32(norm))
        assert not skip
    np.testing.assert_allclose(now.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(now.gradient_norm, norms.mean(), rtol=1e-5)
    for loss, norm, bad in [
        (3.01 * now.loss, 1.0, True),
        (2.99 * now.loss, 1.0, False),
        (1.0, 3.01 * now.gradient_norm, True),
        (1.0, 2.99 * now.gradient_norm, False),
    ]:
        skip, after = judge(now, np.float32(loss), np.float32(norm))
        assert skip == bad
        assert after.averaged == now.averaged + (not bad)
        assert (after.loss == now.loss) == bad
        if not bad:
            want = 0.99 * now.loss + 0.01 * loss
            np.testing.assert_allclose(after.loss, want, rtol=1e-6)
    off = guard.judge(now, 1e9, 1e9, TrainingConfig())
    assert not off[0]


def test_ten_updates_make_up_for_one_skipped():
    judge = jax.jit(
        functools.partial(guard.judge, cfg=TrainingConfig(skip_budget_steps=2))
    )

    def run(losses):
        now = guard.new_guard()
        for loss in losses:
            _, now = judge(now, np.float32(loss), np.float32(1))
        return now

    assert run([np.nan, np.nan]).spent
    assert not run([np.nan] + [1.0] * 10 + [np.nan]).spent
    assert not run([1.0] * 50 + [np.nan]).spent
    assert run([np.nan, *[1.0] * 9, np.nan, np.nan]).spent
    assert not run([1.0] * 3).spent
    never = functools.partial(guard.judge, cfg=TrainingConfig(skip_budget_steps=0))
    now = guard.new_guard().replace(debt=np.int32(10**6))
    assert not never(now, np.float32(np.nan), np.float32(1))[1].spent


def test_once_the_budget_is_spent_the_state_stands_still(good, mesh):
    bad = with_text(tiny.batch(CFG, 1), np.nan)
    once, _ = advance(good, bad, mesh)
    twice, metrics = advance(once, bad, mesh)
    assert metrics["budget_spent"] and twice.step == 3
    assert_equal(guard.before_the_last_skip(twice.guard), once.guard)
    still, _ = advance(twice, tiny.batch(CFG, 2), mesh)
    assert_equal(still, twice)


def test_eight_devices_decide_alike(eight):
    """One example of one device is bad: none of them updates."""
    state = create_state(CFG, eight)
    before = jax.device_get(state)
    batch = with_text(tiny.batch(CFG, 1), np.nan)
    batch = jax.device_put(batch, batch_sharding(eight))
    after, _ = loop.compile_train_step(CFG, eight)(state, batch)
    for leaf in jax.tree.leaves(after):
        copies = {}
        for shard in leaf.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for same in copies.values():
            assert all(np.array_equal(same[0], other) for other in same)
    assert_equal(learned(jax.device_get(after)), learned(before))
    assert (int(after.step), int(after.guard.skipped)) == (1, 1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, mesh):
    """A run of which steps 3, 6 and 7 are bad: `(workdir, message)`."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.raises(UserError) as caught:
        loop.train(CFG, str(workdir), Batches(CFG, mesh, (3, 6, 7)), mesh)
    return workdir, str(caught.value)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_spent_budget_stops_with_a_bundle(stopped, mesh):
    workdir, message = stopped
    assert "stopped at step 7" in message and "loss of nan" in message
    assert "first not finite was the text embeddings of example 51" in message
    assert "checkpoint of step 6" in message
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
    # What the run had learned, of five good steps, is in the bundle.
    kept, _ = Checkpointer(str(workdir / "bundles" / "7")).restore(CFG, mesh)
    saved, _ = Checkpointer(str(workdir)).restore(CFG, mesh)
    assert_equal(learned(jax.device_get(kept)), learned(jax.device_get(saved)))
    assert (int(kept.step), int(kept.guard.skipped)) == (6, 2)
    # The count comes back with a checkpoint.
    assert int(saved.guard.skipped) == 2


def test_a_bundle_names_the_first_layer(stopped, mesh, capsys):
    workdir, _ = stopped
    door.print_replay(str(workdir / "bundles" / "7"))
    told = capsys.readouterr().out
    assert "step 7" in told and "the numbers agree" in told
    assert "first not finite: the text embeddings of example 51" in told


def test_one_device_gives_the_numbers_of_eight(tmp_path, eight):
    """A run of spikes: they are finite, so that there is something to compare.

    Float32, sums in another order: 1e-5 relative.
    """
    state = create_state(CFG, eight)
    low = {"loss": state.guard.loss + 0.01, "averaged": state.guard.averaged + 100}
    loop.check_workdir(CFG, str(tmp_path / "run"))
    checkpointer = Checkpointer(str(tmp_path / "run"), CFG.training)
    state = state.replace(guard=state.guard.replace(**low))
    checkpointer.save(state, CFG, b"0")
    checkpointer.close()
    with pytest.raises(UserError, match="all numbers are finite"):
        loop.train(CFG, str(tmp_path / "run"), Batches(CFG, eight), eight)
    folder = tmp_path / "run" / "bundles" / "2"
    done = bundle.replay(str(folder))
    # A network that was never updated answers 0: the loss is the noise's variance, the
    # mean of 8 * 192 squares of normals.
    assert done.recorded["loss"] == pytest.approx(1, abs=5 * (2 / 1536) ** 0.5)
    for name, value in done.recorded.items():
        np.testing.assert_allclose(done.here[name], value, rtol=1e-5)
    assert bundle.first_not_finite(done.here) == ""
    record = json.loads((folder / "bundle.json").read_text())
    for there, here in zip(
        record["found"]["examples"], done.here["examples"], strict=True
    ):
        assert there["id"] == here["id"]
        for name in ("logsnr", "loss", "text"):
            np.testing.assert_allclose(there[name], here[name], rtol=1e-5)
    # In the order of the passes.
    layers, gradients = list(done.here["layers"]), list(done.here["gradients"])
    assert layers.index("conv_in") < layers.index("conv_out")
    where = [gradients.index(f"{name}/kernel") for name in ("conv_out", "conv_in")]
    assert where == sorted(where)


def test_what_is_named_is_where_it_begins(good, mesh):
    """A parameter, a layer that overflows, a loss, a gradient norm that do."""
    batch = jax.device_put(tiny.batch(CFG), batch_sharding(mesh))

    def cause(name, value, everywhere=False):
        params = jax.tree.map(np.copy, good.params)
        params[name]["bias"][slice(None if everywhere else 1)] = value
        if everywhere:
            params[name]["kernel"][...] = value
        found = bundle.examine(good.replace(params=params), batch, CFG, mesh)
        return bundle.first_not_finite(found)

    assert cause("conv_in", np.nan) == "the parameter conv_in/bias"
    assert cause("conv_in", 1.0) == ""
    # Its square overflows in the normalisation that comes next.
    assert cause("conv_in", 1e30).startswith("the output of layer down_0_first/")
    assert cause("conv_out", 1e25, True) == "the loss of example 0"
    assert "gradient" in cause("conv_out", 1e15, True)


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
    state = create_state(cfg, mesh)
    for number in (0, 1):
        state, _ = advance(state, tiny.batch(cfg, number), mesh)
    moved = state.replace(
        step=state.step + 2, guard=state.guard.replace(skipped=np.int32(2))
    )
    want, _ = advance(moved, tiny.batch(cfg, 4), mesh)
    assert_equal(learned(last), learned(want))


@pytest.mark.parametrize("factor", [0.5, 1.0, -2.0, math.nan])
def test_a_factor_that_would_skip_what_is_normal_is_refused(factor):
    with pytest.raises(UserError, match="spike_factor is .*above 1, or 0"):
        tiny.stage(training={"spike_factor": factor})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "is no bundle"),
        (lambda f: (f / "bundle.json").unlink(), "is no bundle"),
        (lambda f: (f / "bundle.json").write_text("{"), "bundle.json is damaged"),
        (lambda f: (f / "bundle.json").write_text("[]"), "bundle.json is damaged"),
        (lambda f: (f / "batch.npz").unlink(), "batch.npz is damaged"),
        (lambda f: (f / "batch.npz").write_bytes(b"PK"), "batch.npz is damaged"),
        (lambda f: shutil.rmtree(f / "checkpoints"), "checkpoint"),
        (lambda f: shutil.rmtree(f / "checkpoints/6/train"), "train.* is missing"),
    ],
)
def test_a_damaged_bundle_is_refused(stopped, tmp_path, damage, message):
    folder = tmp_path / "bundle"
    shutil.copytree(stopped[0] / "bundles" / "7", folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        bundle.replay(str(folder))
