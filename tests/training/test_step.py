"""One step: the same on any mesh, and the arithmetic of its parts."""

import functools
import math
import re
import threading
from unittest import mock

import jax
import numpy as np
import optax
import pytest

from imagen_jax.batch import batch_spec
from imagen_jax.config import MeshConfig, OptimizerConfig
from imagen_jax.diffusion.loss import noise_batch
from imagen_jax.errors import UserError
from imagen_jax.sharding import batch_sharding, make_mesh
from imagen_jax.training import optimizer, step
from imagen_jax.training.state import abstract_state, create_state
from tests import tiny

# Every kind of layer: the time to compile grows faster than their number.
ATTENTION = {
    "channels": (16,),
    "num_res_blocks": (1,),
    "self_attention": (True,),
    "text_attention": (True,),
}


def run(cfg, mesh_cfg, devices, first, steps=3):
    """Losses, and the last state, of a mesh that begins with the state `first`."""
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    state = jax.device_put(first, places)
    train_step = step.compile_train_step(cfg, mesh)
    losses = []
    for i in range(steps):
        batch = jax.device_put(tiny.batch(cfg, i), batch_sharding(mesh))
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "axes"),
    [
        # Adafactor's factored moments have fewer axes than their parameter.
        (
            tiny.stage(
                model=tiny.ONE_LEVEL | {"channels": (128,)},
                optimizer={"name": "adafactor"},
            ),
            {"data": 2, "fsdp": 2, "tensor": 2},
        ),
        (
            tiny.sr_stage(model=ATTENTION, optimizer={"b2": 0.9}),
            {"fsdp": 2, "spatial": 2, "tensor": 2},
        ),
    ],
    ids=["base", "sr"],
)
def test_eight_devices_give_the_loss_of_one(cfg, axes):
    """Float32, so what differs is the order of sums: 1e-5 relative.

    benchmarks/meshes.py goes through all meshes.
    """
    first = create_state(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))
    first = jax.device_get(first)
    one, state_one = run(cfg, MeshConfig(), 1, first)
    eight, state_eight = run(cfg, MeshConfig(**axes), 8, first)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    # Adam divides by the root of tiny second moments: parameters agree to the
    # learning rate times the relative error of a gradient.
    for a, b in zip(
        jax.tree.leaves(state_eight.params),
        jax.tree.leaves(state_one.params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=3 * cfg.optimizer.learning_rate * 0.1)


@pytest.mark.slow
def test_weights_come_to_the_rows_and_once():
    """Left to itself XLA gathers activations, and weights again on the way back.

    Wider networks then hold activations of the whole batch.
    """
    wider = ATTENTION | {"channels": (128,), "self_attention": (False,)}
    cfg = tiny.sr_stage(training={"batch_size": 8 * 13}, model=wider)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
        batch_spec(cfg),
    )
    state = abstract_state(cfg, mesh)
    train_step = step.compile_train_step(cfg, mesh)
    program = train_step.lower(state, batch).compile().as_text()
    gathered = re.findall(r"= (\S+) all-gather(?:-start)?\(", program)
    rows = [int(re.search(r"\[(\d+)", shape)[1]) for shape in gathered]
    assert not [n for n in rows if n % 13 == 0]
    split = [x for x in jax.tree.leaves(state.params) if "fsdp" in x.sharding.spec]
    assert 0 < len(gathered) <= len(split)
    assert "all-to-all" not in program
    # Gradients of split weights: each device sums its own part over the data axis.
    summed = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program)
    arrays = re.findall(r"\[([\d,]+)\]", " ".join(summed))
    sizes = {math.prod(map(int, shape.split(","))) for shape in arrays}
    parts = {math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in split}
    assert parts <= sizes


@pytest.mark.slow
def test_microbatches_give_the_gradient_of_the_batch():
    """Sums in another order, of numbers that are no larger than the whole."""
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    parts = tiny.stage(model=tiny.ONE_LEVEL, training={"microbatches": 4})
    params = tiny.params(cfg)
    noised = noise_batch(tiny.batch(cfg), jax.random.key(1), cfg)
    (losses, want), (each, have) = (
        jax.jit(functools.partial(step.loss_and_gradients, key=None, cfg=c))(
            params, noised
        )
        for c in (cfg, parts)
    )
    # Each example's own, in its own place.
    np.testing.assert_allclose(each, losses, rtol=1e-5)
    assert len(np.unique(losses)) == 8
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
def test_the_loss_falls_on_one_batch():
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL, diffusion={"prediction": "x0"}, training={"steps": 1}
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(cfg, mesh)
    train_step = step.compile_train_step(cfg, mesh)
    batch = jax.device_put(tiny.batch(cfg), batch_sharding(mesh))
    losses = []
    for _ in range(40):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    # The pictures are uniform noise of variance 1/3 about 0: a mean of 0 is what the
    # untrained network answers, less needs learning.
    assert losses[0] == pytest.approx(1 / 3, rel=0.1)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.slow
def test_one_step_against_optax_by_hand():
    """Clipping, Adam, the average and the counter, on the step's own gradient."""
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL, optimizer={"warmup_steps": 1, "clip_norm": 0.01}
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    train_step = step.compile_train_step(cfg, mesh)
    batch = jax.device_put(tiny.batch(cfg), batch_sharding(mesh))
    first, _ = train_step(create_state(cfg, mesh), batch)
    before = jax.device_get(first)
    after, metrics = train_step(first, batch)
    after = jax.device_get(after)

    assert after.step == 2
    # The gradient as Adam saw it, from its first moment: mu = b1 mu + (1 - b1) g.
    adam_before, adam_after = (
        next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
        for state in (before, after)
    )
    b1 = cfg.optimizer.b1
    gradient = jax.tree.map(
        lambda new, old: (new - b1 * old) / (1 - b1), adam_after.mu, adam_before.mu
    )
    assert metrics["gradient_norm"] > cfg.optimizer.clip_norm
    assert optax.tree.norm(gradient) == pytest.approx(0.01, rel=1e-4)
    rate = cfg.optimizer.learning_rate
    assert metrics["learning_rate"] == pytest.approx(rate)
    want = jax.tree.map(
        lambda p, mu, nu: (
            p - rate * (mu / (1 - b1**2)) / (np.sqrt(nu / (1 - 0.999**2)) + 1e-8)
        ),
        before.params,
        adam_after.mu,
        adam_after.nu,
    )
    decay = 2 / 11
    want_ema = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, before.ema, after.params
    )
    for found, wanted in ((after.params, want), (after.ema, want_ema)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def is_adam(state) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def test_ema_decay_warms_up():
    assert float(step.ema_decay(np.float32(0), 0.999)) == pytest.approx(0.1)
    assert float(step.ema_decay(np.float32(1e9), 0.999)) == pytest.approx(0.999)


def test_learning_rate():
    schedule = optimizer.learning_rate(
        OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_steps=110), 200
    )
    assert float(schedule(5)) == pytest.approx(1.0)
    assert float(schedule(10)) == pytest.approx(2.0)
    assert float(schedule(60)) == pytest.approx(1.0)
    assert float(schedule(110)) == pytest.approx(0.0, abs=1e-6)
    constant = optimizer.learning_rate(
        OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_steps=-1), 200
    )
    assert float(constant(10**6)) == 2.0
    at_once = optimizer.learning_rate(
        OptimizerConfig(learning_rate=2.0, warmup_steps=0, decay_steps=-1), 200
    )
    assert float(at_once(0)) == 2.0


def test_a_decay_ends_with_the_training_unless_told_otherwise():
    """To the bit the schedule whose end is given; a short training only rises."""
    to_the_end = OptimizerConfig(learning_rate=2.0, warmup_steps=10)
    given = OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_steps=110)
    ours = optimizer.learning_rate(to_the_end, 110)
    theirs = optimizer.learning_rate(given, 500)
    for number in range(112):
        assert float(ours(number)) == float(theirs(number))
    assert float(optimizer.learning_rate(to_the_end, 220)(110)) == pytest.approx(
        1.05, 0.1
    )
    for steps in (3, 10):
        short = optimizer.learning_rate(to_the_end, steps)
        assert [float(short(n)) for n in (0, 1, steps)] == pytest.approx(
            [0, 0.2, 0.2 * steps]
        )


@pytest.mark.parametrize(("scaled", "size"), [(True, 1e-3), (False, 1.0)])
def test_adafactor_moves_a_parameter_of_zero(scaled, size):
    """By the rate times 1e-3, the least size that optax takes a parameter for."""
    cfg = OptimizerConfig(
        name="adafactor",
        learning_rate=0.1,
        warmup_steps=0,
        decay_steps=-1,
        parameter_scale=scaled,
        clip_norm=1e9,
    )
    rule = optimizer.make_optimizer(cfg, 1)
    gradient = np.random.default_rng(0).normal(size=(9, 7)).astype("f4")
    zeros = np.zeros_like(gradient)
    update, _ = rule.update(gradient, rule.init(zeros), zeros)
    # The first step divides each gradient by its own size.
    np.testing.assert_allclose(update, -0.1 * size * np.sign(gradient), rtol=1e-3)


def test_data_may_be_opened_while_xla_compiles(monkeypatch):
    """XLA waits for the data here. Errors of both are raised, the data's at once."""
    opened, done = threading.Event(), threading.Event()
    jitted = mock.Mock()

    def compile_slowly():
        assert opened.wait(60)
        done.set()

    def fail():
        raise UserError("no records")

    jitted.lower.return_value.compile = compile_slowly
    monkeypatch.setattr(step, "jit_train_step", lambda *args: jitted)
    cfg, mesh = tiny.stage(), make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match="no records"):
        step.compile_train_step(cfg, mesh, fail)
    assert not done.is_set()
    assert step.compile_train_step(cfg, mesh, opened.set) is jitted
    assert done.wait(60)
    jitted.lower.return_value.compile = mock.Mock(side_effect=MemoryError)
    with pytest.raises(MemoryError):
        step.compile_train_step(cfg, mesh)


def test_a_batch_of_another_shape_is_refused():
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    other = tiny.stage(text={"dim": 16})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"batch\.text is bfloat16\[8, 4, 16\]"):
        step.compile_train_step(cfg, mesh)(create_state(cfg, mesh), tiny.batch(other))


def test_adafactors_placeholders_are_handed_on():
    """The values are optax's; what stands for a moment that is not there is no copy."""
    shapes = {"factored": (128, 130), "whole": (5, 7), "one": (1,), "vector": (300,)}
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    cfg = OptimizerConfig(name="adafactor", parameter_scale=False)
    ours = optimizer.make_optimizer(cfg, 100)
    theirs = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adafactor(
            optimizer.learning_rate(cfg, 100), multiply_by_parameter_scale=False
        ),
    )
    states = [ours.init(params), theirs.init(params)]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grads = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        found = [
            jax.jit(rule.update)(grads, state, params)
            for rule, state in zip((ours, theirs), states, strict=True)
        ]
        states = [state for _, state in found]
        jax.tree.map(np.testing.assert_array_equal, *found)
        assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])

    program = jax.make_jaxpr(ours.update)(params, states[0], params).jaxpr
    handed = set(program.invars) & set(program.outvars)
    # Two of each unfactored parameter, one of each factored, but none of "one".
    assert [v.aval.shape for v in handed] == [(1,)] * 5
