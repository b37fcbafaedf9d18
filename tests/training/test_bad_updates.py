"""Bad numbers: skipped and counted, until the budget is spent."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from imagen_jax.batch import batch_spec
from imagen_jax.config import MeshConfig, TrainingConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import batch_sharding, make_mesh
from imagen_jax.training import bad_updates as guard
from imagen_jax.training.state import abstract_state, create_state
from imagen_jax.training.step import compile_train_step
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
def compiled(mesh):
    return compile_train_step(CFG, mesh)


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


def advance(state, batch, mesh):
    """The state after a step, and its metrics, on the host; `state` stays."""
    state = jax.device_get(state)
    batch = jax.device_put(batch, batch_sharding(mesh))
    return jax.device_get(compiled(mesh)(state, batch))


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_kept_is_not_copied(mesh):
    """XLA copies the old values of an array that two fusions read, in each step."""
    run = compiled(mesh)
    state, batch = abstract_state(CFG, mesh), batch_spec(CFG)
    program = run.lower(state, batch).compile().as_text()
    names = r"%?state_(?:params|ema)\w*"
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
    now = guard.Guard()
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
        now = guard.Guard()
        for loss in losses:
            _, now = judge(now, np.float32(loss), np.float32(1))
        return now

    assert run([np.nan, np.nan]).spent
    assert not run([np.nan] + [1.0] * 10 + [np.nan]).spent
    assert not run([1.0] * 50 + [np.nan]).spent
    assert run([np.nan, *[1.0] * 9, np.nan, np.nan]).spent
    assert not run([1.0] * 3).spent
    never = functools.partial(guard.judge, cfg=TrainingConfig(skip_budget_steps=0))
    now = guard.Guard().replace(debt=np.int32(10**6))
    assert not never(now, np.float32(np.nan), np.float32(1))[1].spent


def test_once_the_budget_is_spent_the_state_stands_still(good, mesh):
    bad = with_text(tiny.batch(CFG, 1), np.nan)
    once, _ = advance(good, bad, mesh)
    twice, metrics = advance(once, bad, mesh)
    assert metrics["budget_spent"] and twice.step == 3
    assert_equal(guard.before_the_last_skip(twice.guard), once.guard)
    still, _ = advance(twice, tiny.batch(CFG, 2), mesh)
    assert_equal(still, twice)


@pytest.mark.slow
def test_eight_devices_decide_alike(eight):
    """One example of one device is bad: none of them updates."""
    state = create_state(CFG, eight)
    before = jax.device_get(state)
    batch = with_text(tiny.batch(CFG, 1), np.nan)
    batch = jax.device_put(batch, batch_sharding(eight))
    after, _ = compiled(eight)(state, batch)
    for leaf in jax.tree.leaves(after):
        copies = {}
        for shard in leaf.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for same in copies.values():
            assert all(np.array_equal(same[0], other) for other in same)
    assert_equal(learned(jax.device_get(after)), learned(before))
    assert (int(after.step), int(after.guard.skipped)) == (1, 1)


@pytest.mark.parametrize("factor", [0.5, 1.0, -2.0, math.nan])
def test_a_factor_that_would_skip_what_is_normal_is_refused(factor):
    with pytest.raises(UserError, match=r"spike_factor is .*(more than 1|in \[0, inf)"):
        tiny.stage(training={"spike_factor": factor})
