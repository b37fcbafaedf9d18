"""Lines of metrics: which steps they average, and that a cut one ends."""

import dataclasses
import importlib.machinery
import json
import sys
import threading
import time
import types
import unittest.mock

import numpy as np
import pytest

from imagen_jax.training.metrics import (
    MEANS,
    IntervalMeans,
    MetricWriter,
    Stopwatch,
    bucket_names,
)
from tests import tiny


def metrics(loss, hit=0, **more):
    """Metrics of a step whose three examples fell into one range of log-SNR."""
    here = np.arange(len(bucket_names())) == hit
    split = {"sum": here * 3 * np.float32(loss), "count": here * 3.0}
    flags = {"skipped": False, "budget_spent": False, "skipped_updates": 0}
    row = dict.fromkeys(MEANS, np.float32(loss)) | {"loss_by_logsnr": split}
    return row | flags | more


class Lines:
    """A writer that keeps its lines."""

    def __init__(self):
        self.rows, self.events = {}, []

    def scalars(self, step, values):
        assert step not in self.rows
        self.rows[step] = dict(values)

    def event(self, kind, step):
        self.events.append((kind, step))


def means(**training):
    writer = Lines()
    cfg = tiny.stage(training=training)
    return IntervalMeans(cfg, writer, unittest.mock.Mock()), writer


@pytest.mark.parametrize("log_every", [1, 2, 3, 5, 100])
def test_a_checkpoints_metrics_are_the_means_since_the_one_before(log_every):
    """However the steps are logged; a step whose update was skipped does not count."""
    log, writer = means(keep_best_checkpoints=1, log_every_steps=log_every)
    found = []
    for step in range(1, 9):
        loss = np.nan if step == 6 else step
        log.add(step, metrics(loss, step % 2, skipped=step == 6))
        if step in (3, 7, 8):
            log.fetch(step)
            found.append(log.since_checkpoint())
    # Summed in float32.
    want = pytest.approx([2.0, (4 + 5 + 7) / 3, 8.0], rel=1e-6)
    assert [row["loss"] for row in found] == want
    even, odd = bucket_names()[:2]
    assert found[0][even] == 2.0 and found[0][odd] == 2.0
    assert found[1][even] == 4.0 and found[1][odd] == 6.0
    assert odd not in found[2]
    log.flush(8)
    # A line for each interval, and at the end.
    assert list(writer.rows) == sorted({*range(log_every, 9, log_every), 8})
    assert writer.events == [("steps", step) for step in writer.rows]


@pytest.mark.parametrize("stop", range(1, 9))
def test_lines_do_not_tell_where_a_run_was_stopped(stop):
    """A checkpoint takes the steps that have no line yet along, as JSON."""

    def run(log, first, last):
        for step in range(first, last + 1):
            loss = np.nan if step == 4 else step / 3
            log.add(step, metrics(loss, step % 2, skipped=step == 4))
        log.fetch(last)

    whole, want = means(log_every_steps=3)
    run(whole, 1, 8)
    whole.flush(8)
    log, before = means(log_every_steps=3)
    run(log, 1, stop)
    saved = json.loads(json.dumps(log.unlogged, allow_nan=False))
    after = Lines()
    log = IntervalMeans(log.cfg, after, unittest.mock.Mock(), saved)
    run(log, stop + 1, 8)
    log.flush(8)
    kept = {step: row for step, row in before.rows.items() if step <= stop - len(saved)}
    rows = kept | after.rows
    for row in (*rows.values(), *want.rows.values()):
        for name in ("steps_per_second", "images_per_second"):
            row.pop(name, None)
    assert rows == want.rows and list(rows) == [3, 6, 8]


def test_a_line_is_written_when_the_next_step_is_on_its_way():
    log, writer = means(log_every_steps=2)
    written = []
    for step in range(1, 6):
        log.add(step, metrics(step))
        written.append(list(writer.rows))
    assert written == [[], [], [2], [2], [2, 4]]
    assert [row["loss"] for row in writer.rows.values()] == [1.5, 3.5]


def test_nothing_is_written_after_the_budget_is_spent():
    log, writer = means(log_every_steps=4)
    for step in range(1, 6):
        bad = step >= 3
        more = {"skipped": bad, "budget_spent": bad, "skipped_updates": int(bad)}
        log.add(step, metrics(np.nan if bad else step, **more))
    log.flush(5)
    assert list(writer.rows) == [3] and writer.rows[3]["loss"] == 1.5
    assert writer.rows[3]["skipped_updates"] == 1
    assert sorted(log.spent) == ["gradient_norm", "loss"]


def test_rates_are_those_of_the_clock(monkeypatch):
    log, writer = means(log_every_steps=2, batch_size=8)
    # Written, written, paused from and to, written.
    now = iter([10.0, 14.0, 20.0, 27.0, 28.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    for step in range(1, 6):
        log.add(step, metrics(1))
    log.fetch(5)
    with log.pause():
        pass
    log.flush(5)
    assert "steps_per_second" not in writer.rows[2]
    rates = [writer.rows[step]["steps_per_second"] for step in (4, 5)]
    assert rates == [2 / 4, 1 / (28 - 14 - 7)]
    assert writer.rows[4]["images_per_second"] == 4


def test_what_is_done_again_is_logged_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"ev')
    writer = MetricWriter(str(tmp_path), Stopwatch(), tiny.stage())
    writer.begin(1)
    writer.scalars(2, {"loss": 0.5})
    writer.event("steps", 2, more=1)
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1}', '{"step": 2, "loss": 0.5}']
    start, cut, event = (tmp_path / "events.jsonl").read_text().splitlines()
    assert (start, cut) == ('{"event": "start"}', '{"ev')
    names = ["event", "step", "seconds", "monotonic", "spent", "more"]
    assert list(json.loads(event)) == names
    assert list((tmp_path / "tensorboard").iterdir())


def test_tensorboard_gets_the_same(tmp_path):
    """As TensorFlow reads its files; written by no other thread, which could hang."""
    import tensorflow as tf

    threads = set(threading.enumerate())
    writer = MetricWriter(str(tmp_path), Stopwatch(), tiny.stage())
    for step in range(1, 40):
        writer.scalars(step, {"loss": 0.5 * step, "loss_by_logsnr/to_0": 2.0})
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    writer.image(39, "samples", picture)
    assert set(threading.enumerate()) == threads
    writer.event("evaluation", 39)
    (path,) = (tmp_path / "tensorboard").iterdir()
    rows = []
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            if value.HasField("image"):
                shown = tf.io.decode_png(value.image.encoded_image_string)
                np.testing.assert_array_equal(shown, picture)
                rows.append((event.step, "samples"))
            else:
                rows.append((event.step, value.tag, value.simple_value))
    assert rows[-1] == (39, "samples")
    assert rows[:-1] == [
        row
        for step in range(1, 40)
        for row in ((step, "loss", 0.5 * step), (step, "loss_by_logsnr/to_0", 2.0))
    ]
    writer.close()


def test_a_full_disk_is_an_error_of_whoever_writes(tmp_path, monkeypatch):
    """Also when only TensorBoard's file finds no room."""
    writer = MetricWriter(str(tmp_path), Stopwatch(), tiny.stage())
    full = open("/dev/full", "wb")
    monkeypatch.setattr(writer._tensorboard._py_recordio_writer, "_writer", full)
    with pytest.raises(OSError, match="No space left"):
        for step in range(500):
            writer.scalars(step, {"loss": 0.5})
        writer.event("checkpoint", 500)
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
    """If it is installed and a project is named; a resumed run goes on with its own."""
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.is_done = options, [], False
            runs.append(self)

        def log(self, values, step):
            self.rows.append((step, values))

        def finish(self):
            self.is_done = True

    wandb = types.ModuleType("wandb")
    wandb.init, wandb.Image = Run, lambda image: image.shape
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = tiny.stage()
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    MetricWriter(str(tmp_path), Stopwatch(), cfg).close()
    assert not runs
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for folder in ("a", "a", "b"):
        writer = MetricWriter(str(tmp_path / folder), Stopwatch(), cfg)
        writer.scalars(2, {"loss": 0.5})
        writer.image(2, "samples", np.zeros((4, 6, 3), np.uint8))
        writer.close()
    logged = [(2, {"loss": 0.5}), (2, {"samples": (4, 6, 3)})]
    assert [run.rows for run in runs] == [logged] * 3
    assert all(run.is_done for run in runs)
    one, again, other = (run.options["id"] for run in runs)
    assert one == again != other
    assert runs[0].options["config"] == dataclasses.asdict(cfg)
