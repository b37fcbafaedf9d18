"""The held-out loss against a plain loop, and where a run tells of it."""

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import prepare
from imagen_jax.api import run
from imagen_jax.batch import Cond
from imagen_jax.config import MeshConfig
from imagen_jax.data.pipeline import open_records, open_sources, read_heldout
from imagen_jax.diffusion.loss import LOGSNR_EDGES, losses, noise_batch
from imagen_jax.errors import Stopped, UserError
from imagen_jax.models import network
from imagen_jax.sharding import batch_sharding, make_mesh
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.heldout import HELD_OUT, compile_heldout_loss, heldout_loss
from imagen_jax.training.metrics import bucket_names
from imagen_jax.training.page import page
from imagen_jax.training.state import create_state
from tests import tiny

DROPPED = {"text_dropout": 0.5}


def _mesh(devices, **axes):
    return make_mesh(MeshConfig(**axes), jax.devices()[:devices])


def _state(cfg, mesh):
    """Another average than the parameters, and none at zero."""
    state = create_state(cfg, mesh)
    params = jax.tree.map(lambda leaf: leaf + 0.05, state.params)
    return state.replace(params=params, ema=jax.tree.map(lambda x: x * 0.5, params))


def _batches(cfg, mesh, count=2):
    made = [tiny.batch(cfg, seed) for seed in range(count)]
    return [jax.device_put(batch, batch_sharding(mesh)) for batch in made]


def _measured(cfg, mesh):
    measure = compile_heldout_loss(cfg, mesh)
    return heldout_loss(measure, _state(cfg, mesh), _batches(cfg, mesh))


def _one_by_one(cfg, params, batches):
    """Loss and log-SNR of every example, by the paper's Eq. 3 with numpy's numbers."""
    apply = jax.jit(functools.partial(network.apply, cfg.model, params))
    for number, batch in enumerate(batches):
        key_t, key_example = jax.random.split(
            jax.random.fold_in(jax.random.key(0), number)
        )
        size = len(batch.id)
        start = float(jax.random.uniform(key_t))
        for i in range(size):
            key_eps = jax.random.split(jax.random.fold_in(key_example, i), 4)[0]
            x0 = np.asarray(batch.image[i], float) / 127.5 - 1
            eps = np.asarray(jax.random.normal(key_eps, x0.shape))
            t = (start + i / size) % 1.0
            # The cosine schedule: log(tan(pi t / 2) ** -2), clipped.
            logsnr = np.clip(-2 * np.log(np.tan(np.pi * t / 2)), -20, 20)
            alpha = (1 + np.exp(-logsnr)) ** -0.5
            sigma = (1 + np.exp(logsnr)) ** -0.5
            z = jnp.asarray((alpha * x0 + sigma * eps)[None], jnp.float32)
            cond = Cond(text=batch.text[i : i + 1], mask=batch.mask[i : i + 1])
            at = jnp.asarray([logsnr], jnp.float32)
            output = apply(z, at, cond)
            yield np.mean((np.asarray(output[0], float) - eps) ** 2), logsnr


def _means(name, found):
    """The mean of all, and of those between the edges."""
    values = {name: np.mean([loss for loss, _ in found])}
    edges = [-np.inf, *LOGSNR_EDGES, np.inf]
    for own, low, high in zip(bucket_names(name), edges, edges[1:]):
        here = [loss for loss, logsnr in found if low < logsnr <= high]
        if here:
            values[own] = np.mean(here)
    return values


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_it_is_the_loss_of_each_example_with_its_caption(microbatches):
    """None of the captions is dropped, though the training drops half of them."""
    training = {"microbatches": microbatches}
    cfg = tiny.stage(model=tiny.ONE_LEVEL, diffusion=DROPPED, training=training)
    mesh = _mesh(1)
    have, state, batches = _measured(cfg, mesh), _state(cfg, mesh), _batches(cfg, mesh)
    want = {}
    for name, params in zip(HELD_OUT, (state.params, state.ema), strict=True):
        want |= _means(name, list(_one_by_one(cfg, params, batches)))
    assert have.keys() == want.keys() and len(want) > 10
    for name, value in want.items():
        assert have[name] == pytest.approx(value, rel=2e-4), name
    assert have["heldout_loss"] != pytest.approx(have["heldout_ema_loss"], rel=0.01)


@pytest.mark.slow
def test_a_super_resolution_stage_has_the_training_loss_without_dropout():
    cfg = tiny.sr_stage(model=tiny.ONE_LEVEL, diffusion=DROPPED)
    mesh = _mesh(1)
    have, state = _measured(cfg, mesh), _state(cfg, mesh)
    whole = dataclasses.replace(
        cfg, diffusion=dataclasses.replace(cfg.diffusion, text_dropout=0.0)
    )
    found = []
    for number, batch in enumerate(_batches(cfg, mesh)):
        key = jax.random.fold_in(jax.random.key(0), number)
        noised = noise_batch(batch, key, whole)

        def denoise(z, logsnr, cond):
            return network.apply(cfg.model, state.ema, z, logsnr, cond)

        found += zip(losses(denoise, noised).tolist(), noised.logsnr.tolist())
    for name, value in _means("heldout_ema_loss", found).items():
        assert have[name] == pytest.approx(value, rel=2e-4), name


@pytest.mark.slow
def test_on_several_devices_it_is_the_same():
    cfg = tiny.stage(model=tiny.ONE_LEVEL, diffusion=DROPPED)
    one = _measured(cfg, _mesh(1))
    eight = _measured(cfg, _mesh(8, fsdp=2, spatial=2))
    assert one == pytest.approx(eight, rel=1e-4)


@pytest.mark.slow
def test_noise_is_the_same_for_every_step_and_seed():
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    mesh = _mesh(1)
    state, batches = _state(cfg, mesh), _batches(cfg, mesh)
    found = []
    for seed, step in ((0, 0), (0, 9), (5, 3)):
        own = tiny.stage(model=tiny.ONE_LEVEL, training={"seed": seed})
        measure = compile_heldout_loss(own, mesh)
        at = state.replace(step=jax.numpy.full_like(state.step, step))
        found.append(heldout_loss(measure, at, batches))
    assert found[0] == found[1] == found[2]


@pytest.fixture
def quick(no_arithmetic, monkeypatch):
    """A run without a network's arithmetic, whose losses depend on the parameters."""

    def measure(state, batch, number):
        moved = np.float64(jax.tree.leaves(state.params)[0].sum()) + number
        sums = {"sum": np.full(8, moved), "count": np.ones(8)}
        return dict.fromkeys(HELD_OUT, sums)

    monkeypatch.setattr(loop, "compile_heldout_loss", lambda cfg, mesh: measure)
    return measure


def _lines(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{n: x for n, x in r.items() if "_per_second" not in n} for r in rows]


def _train(cfg, workdir, mesh, hook=None, heldout=True):
    batches = tiny.Batches(cfg, mesh)
    if hook:
        batches.hook = hook
    held = functools.partial(_batches, cfg, mesh) if heldout else None
    return loop.train(cfg, str(workdir), batches, mesh, heldout=held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, [2, 4, 6, 7]),
        ({"checkpoint_every_steps": 5}, [5, 7]),
        ({"heldout_every_steps": 3}, [3, 6, 7]),
        ({"heldout_every_steps": 100}, [7]),
    ],
)
def test_lines_at_checkpoints_or_as_asked(tmp_path, quick, training, steps):
    cfg = tiny.stage(model=tiny.ONE_LEVEL, training={"steps": 7, **training})
    state = _train(cfg, tmp_path, _mesh(1))
    rows = _lines(tmp_path)
    held = [row for row in rows if "heldout_loss" in row]
    assert [row["step"] for row in held] == steps
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 7]
    want = heldout_loss(quick, state, _batches(cfg, _mesh(1)))
    assert held[-1] == {"step": 7, **want}
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    spent = [json.loads(line)["spent"] for line in events]
    assert sum("evaluation" in own for own in spent) == len(steps) - 1


@pytest.mark.slow
def test_without_held_out_examples_nothing_is_measured(tmp_path, no_arithmetic):
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    _train(cfg, tmp_path, _mesh(1), heldout=False)
    assert not [row for row in _lines(tmp_path) if "heldout_loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "log_every"), [(1, 3), (4, 1), (5, 100)])
def test_lines_do_not_tell_where_a_run_was_stopped(tmp_path, quick, stop, log_every):
    """Stopped by a signal, at a step that measures or at another."""
    training = {"steps": 7, "log_every_steps": log_every, "heldout_every_steps": 2}
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL, training=training | {"checkpoint_every_steps": 3}
    )
    _train(cfg, tmp_path / "whole", _mesh(1))

    def interrupt(taken):
        if taken == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        _train(cfg, tmp_path / "run", _mesh(1), interrupt)
    _train(cfg, tmp_path / "run", _mesh(1))
    whole = _lines(tmp_path / "whole")
    assert _lines(tmp_path / "run") == whole
    steps = [row["step"] for row in whole if "heldout_loss" in row]
    assert steps == [2, 4, 6, 7]


@pytest.mark.slow
def test_the_best_checkpoints_may_be_those_of_the_held_out_loss(
    tmp_path, quick, monkeypatch
):
    values = iter([5.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr(
        loop, "heldout_loss", lambda *args: {"heldout_ema_loss": next(values)}
    )
    training = {"steps": 8, "keep_checkpoints": 1, "keep_best_checkpoints": 1}
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL, training=training | {"best_metric": "heldout_ema_loss"}
    )
    _train(cfg, tmp_path, _mesh(1))
    assert Checkpointer(str(tmp_path)).manager.all_steps() == [4, 8]


def test_the_best_of_what_is_not_measured_is_refused(tmp_path):
    cfg = tiny.stage(training={"best_metric": "heldout_loss"})
    with pytest.raises(UserError, match="best_metric is 'heldout_loss'"):
        _train(cfg, tmp_path, _mesh(1), heldout=False)


def test_the_page_draws_it_however_many_lines_there_are():
    rows = []
    for step in range(1, 3001):
        rows.append({"step": step, "loss": 1.0, "steps_per_second": 2.0})
        rows[-1]["images_per_second"] = 2.0
        if step % 500 == 0:
            rows.append({"step": step, "heldout_loss": 2.0, "heldout_ema_loss": 3.0})
    told = page(tiny.stage(), list(map(json.dumps, rows)), [], [])
    for text in ("heldout loss: 2 at step 3,000", "heldout ema loss: 3 at step 3,000"):
        assert text in told
    line = told.split("heldout loss: 2")[0].rsplit('points="')[-1].split('"')[0]
    assert len({*line.split()}) == 6
    assert "2 images per second" in told


@pytest.mark.slow
def test_a_run_of_records_trains_on_the_others(tmp_path, monkeypatch):
    path = str(tmp_path / "records.npz")
    options = {"image_size": 8, "text_length": 4, "progress": False}
    prepare.prepare("shapes:40", path, **options)
    cfg = open_sources(
        tiny.stage(
            model=tiny.ONE_LEVEL,
            data={"records": path, "heldout_share": 0.3},
            text={"length": 4, "dim": 64, "encoder": ""},
            training={"heldout_images": 10},
        )
    )[0]
    seen = []

    class Noted(Iterator):
        def __init__(self, cfg, mesh):
            self.stream = open_records(cfg, mesh)
            self.get_state = self.stream.get_state
            self.set_state = self.stream.set_state

        def __next__(self):
            batch = next(self.stream)
            seen.extend(np.asarray(batch.id).tolist())
            return batch

    monkeypatch.setattr(run, "open_records", Noted)
    state = run.train_stage(cfg, str(tmp_path / "run"))
    mesh = make_mesh(cfg.mesh)
    held = read_heldout(cfg, mesh)
    ids = {int(i) for batch in held for i in batch.id}
    assert len(held) == 2 and ids and not ids & set(seen)
    row = [own for own in _lines(tmp_path / "run") if "heldout_loss" in own][-1]
    measure = compile_heldout_loss(cfg, mesh)
    assert row == {"step": 4, **heldout_loss(measure, state, held)}
