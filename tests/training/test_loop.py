"""The loop: resuming, stopping, and what lies in a workdir."""

import dataclasses
import json
import os
import signal
import unittest.mock

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax.config import MeshConfig
from imagen_jax.errors import Stopped, UserError
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.log import MEANS, Log, bucket_names
from tests import tiny


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def train(cfg, workdir, mesh, hook=None):
    batches = tiny.Batches(cfg, mesh)
    if hook:
        batches.hook = hook
    return jax.device_get(loop.train(cfg, str(workdir), batches, mesh))


def assert_equal_states(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, mesh):
    """Bitwise: parameters, average, optimizer, step, and the batches taken."""
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    whole = train(cfg, tmp_path / "whole", mesh)
    train(tiny.with_steps(cfg, 2), tmp_path / "parts", mesh)
    assert_equal_states(train(cfg, tmp_path / "parts", mesh), whole)
    events = lines(tmp_path / "parts" / "events.jsonl")
    sources = [line["source"] for line in events if line["event"] == "start"]
    assert sources == ["scratch", "checkpoint"]


@pytest.mark.slow
def test_a_signal_saves_and_stops(tmp_path, mesh):
    cfg = tiny.stage(model=tiny.ONE_LEVEL)

    def interrupt(taken):
        if taken == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="step 3"):
        train(cfg, tmp_path / "run", mesh, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert Checkpointer(str(tmp_path / "run")).latest_step() == 3
    resumed = train(cfg, tmp_path / "run", mesh)
    assert_equal_states(resumed, train(cfg, tmp_path / "whole", mesh))
    events = [line["event"] for line in lines(tmp_path / "run" / "events.jsonl")]
    assert events[0] == "start" and "stop" in events and events[-1] == "done"


def test_the_workdir_holds_what_it_should(tmp_path, mesh):
    cfg = tiny.sr_stage(
        model=tiny.ONE_LEVEL, training={"sample_every_steps": 4, "steps": 5}
    )
    batches = tiny.Batches(cfg, mesh)
    preview = tiny.batch(cfg)
    preview = jax.tree.map(lambda x: x[:3], preview)
    loop.train(cfg, str(tmp_path), batches, mesh, preview)
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [2, 4, 5]
    assert all(np.isfinite(row["loss"]) for row in metrics)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "events.jsonl",
    }
    # A row of samples above the row of the pictures that they should become.
    sheet = np.asarray(Image.open(tmp_path / "samples" / "00000004.png"))
    truth = preview.image[0]
    assert (sheet[4 + 16 : 4 + 32, 4 : 4 + 16] == truth).all()
    assert Checkpointer(str(tmp_path)).stage() == cfg


def test_only_the_newest_checkpoints_stay(tmp_path, mesh):
    cfg = tiny.stage(
        training={"checkpoint_every_steps": 1, "keep_checkpoints": 2, "steps": 4}
    )
    train(cfg, tmp_path, mesh)
    steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert steps == {3, 4}


def test_a_workdir_of_another_config_is_refused(tmp_path):
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    loop.check_workdir(cfg, str(tmp_path / "run"))
    free = dataclasses.replace(
        cfg, mesh=MeshConfig(data=2), data=dataclasses.replace(cfg.data, records="x")
    )
    loop.check_workdir(tiny.with_steps(free, 9), str(tmp_path / "run"))
    other = tiny.stage(model=tiny.ONE_LEVEL, optimizer={"learning_rate": 0.5})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.5"):
        loop.check_workdir(other, str(tmp_path / "run"))
    encoder = tiny.stage(model=tiny.ONE_LEVEL, text={"encoder": "other@1"})
    with pytest.raises(UserError, match=r"text\.encoder: 'fake@1' -> 'other@1'"):
        loop.check_workdir(encoder, str(tmp_path / "run"))


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="not the config of a run"):
        loop.check_workdir(tiny.stage(), str(tmp_path))


@pytest.mark.parametrize("log_every", [1, 2, 3, 5, 100])
def test_a_checkpoints_metrics_are_the_means_since_the_one_before(log_every):
    """However the steps are logged; a step whose update was skipped does not count."""
    cfg = tiny.stage(
        training={"keep_best_checkpoints": 1, "log_every_steps": log_every}
    )
    written, bar = [], unittest.mock.Mock()
    writer = unittest.mock.Mock(scalars=lambda step, means: written.append(step))
    log, found = Log(cfg, writer), []
    buckets = len(bucket_names())
    budget = {"budget_spent": False, "skipped_updates": 0}
    for step in range(1, 9):
        hit = np.arange(buckets) == step % 2
        loss = np.float32(np.nan if step == 6 else step)
        split = {"sum": hit * 3 * loss, "count": hit * 3.0}
        row = dict.fromkeys(MEANS, loss) | {"loss_by_logsnr": split}
        log.add(step, row | {"skipped": step == 6, **budget}, bar)
        if step in (3, 7, 8):
            found.append(log.since_checkpoint())
    log.flush(8, bar)
    # Summed in float32.
    want = pytest.approx([2.0, (4 + 5 + 7) / 3, 8.0], rel=1e-6)
    assert [means["loss"] for means in found] == want
    even, odd = bucket_names()[:2]
    assert found[0][even] == 2.0 and found[0][odd] == 2.0
    assert found[1][even] == 4.0 and found[1][odd] == 6.0
    assert odd not in found[2]
    assert written == sorted({*range(log_every, 9, log_every), 8})


def test_an_unknown_metric_is_refused(tmp_path, mesh):
    cfg = tiny.stage(training={"best_metric": "los"})
    with pytest.raises(UserError, match=r"best_metric is 'los'.*did you mean 'loss'"):
        loop.train(cfg, str(tmp_path / "run"), tiny.Batches(cfg, mesh), mesh)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no config.json"):
        loop.check_workdir(tiny.stage(), str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_sampling_an_untrained_workdir_is_refused(tmp_path):
    loop.check_workdir(tiny.stage(), str(tmp_path))
    with pytest.raises(UserError, match="train this stage first"):
        Checkpointer(str(tmp_path)).stage()


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    cfg = tiny.stage(training={"batch_size": 12})
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match="does not divide over 8 shards.*example 8"):
        loop.train(cfg, str(tmp_path / "run"), tiny.Batches(cfg, mesh), mesh)
    assert not (tmp_path / "run").exists()
