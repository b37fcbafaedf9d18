"""Goodput's buckets against scripts of what took how long."""

import functools
import json
from collections import Counter

import jax
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.goodput import BUCKETS, goodput
from imagen_jax.training.metrics import Stopwatch
from tests import tiny
from tests.clock import Clock


class Result:
    """The result of a step that is ready when it is told to be."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def test_a_second_is_in_the_innermost_bucket():
    clock = Clock()
    stopwatch = Stopwatch(clock.monotonic, clock.wall)
    clock.advance(1)
    stopwatch.switch("step")
    clock.advance(2)
    with pytest.raises(KeyboardInterrupt), stopwatch.bucket("checkpoint"):
        clock.advance(4)
        lap = stopwatch.lap()
        clock.advance(8)
        raise KeyboardInterrupt
    clock.advance(16)
    assert lap["spent"] == {"start": 1, "step": 2, "checkpoint": 4}
    lap = stopwatch.lap()
    assert lap["spent"] == {"checkpoint": 8, "step": 16}
    assert lap["monotonic"] == clock.monotonic() and lap["seconds"] == clock.wall()
    assert stopwatch.lap()["spent"] == {}


def test_waiting_while_the_devices_are_busy_is_a_part_of_the_step():
    clock = Clock()
    stopwatch = Stopwatch(clock.monotonic, clock.wall)
    stopwatch.switch("step")
    for seconds, running in ((1, Result(False)), (2, Result(True)), (4, None)):
        with stopwatch.bucket("input_wait", running=running):
            clock.advance(seconds)
    assert stopwatch.lap()["spent"] == {"step": 1, "input_wait": 6}


class Script:
    """Lines of an events.jsonl, and the clock that they were written by."""

    def __init__(self):
        self.clock, self.lines = Clock(), []

    def line(self, event, step, more=None, /, **spent):
        """An event after so many seconds of each bucket."""
        self.clock.advance(sum(spent.values()))
        line = {"event": event, "step": step, "seconds": self.clock.wall()}
        line |= {"monotonic": self.clock.monotonic(), "spent": spent}
        self.lines.append(json.dumps(line | (more or {})))
        return self

    def down(self, seconds):
        self.clock.advance(seconds)
        self.clock.restart()
        return self

    def report(self):
        return goodput(self.lines)


def run(script, first=0):
    """Ten steps of 4 s with a checkpoint after five."""
    script.line("start", first, start=8).line("compile", first, compile=32)
    script.line("steps", first + 4, step=16, input_wait=2)
    script.line("steps", first + 5, step=4)
    script.line("checkpoint", first + 5, checkpoint=1)
    script.line("steps", first + 8, step=12, input_wait=2)
    return script.line("steps", first + 10, step=8)


def buckets(report):
    assert list(report.seconds) == list(BUCKETS)
    return {name: seconds for name, seconds in report.seconds.items() if seconds}


ONE_RUN = {"start": 8, "compile": 32, "step": 40, "input_wait": 4, "checkpoint": 1}
TWO_RUNS = dict(Counter(ONE_RUN) + Counter(ONE_RUN))


def test_a_run_is_what_its_lines_tell():
    report = run(Script()).line("done", 10, checkpoint=3).report()
    assert buckets(report) == ONE_RUN | {"checkpoint": 4}
    assert (report.wall_seconds, report.goodput) == (88, 40 / 88)
    assert (report.steps, report.steps_lost, report.runs) == (10, 0, 1)
    assert (report.last_event, report.last_step) == ("done", 10)
    assert not report.bad_lines


def test_a_killed_run_loses_what_came_after_its_checkpoint():
    """And one that is killed again before it saves loses all."""
    script = run(run(Script()).down(100), first=5).down(200)
    script.line("start", 10, start=8).line("done", 10)
    report = script.report()
    # Of each run the five steps after the checkpoint.
    want = TWO_RUNS | {"step": 40, "lost": 40, "start": 24, "down": 300}
    assert buckets(report) == want
    assert (report.steps, report.steps_lost, report.runs) == (20, 10, 3)
    assert report.wall_seconds == 2 * 85 + 300 + 8


def test_a_damaged_checkpoint_loses_what_came_before_it():
    script = run(Script()).down(1).line("start", 0, start=8)
    script.line("steps", 4, step=8).down(1).line("start", 0, start=8)
    report = script.report()
    assert report.seconds["step"] == 0 and report.seconds["lost"] == 40 + 8
    assert (report.steps, report.steps_lost) == (14, 14)


def test_a_rollback_loses_steps_and_its_own_time():
    script = run(Script())
    script.line("budget_spent", 10, {"action": "rollback"}, lost=16)
    script.line("rollback", 10, {"to": 5}, lost=8)
    script.line("steps", 12, step=8).line("done", 12)
    report = script.report()
    assert buckets(report) == ONE_RUN | {"step": 28, "lost": 20 + 24}
    assert (report.steps, report.steps_lost) == (12, 5)
    # Killed before it saves, it loses steps 11 and 12, and those before only once.
    following = Script()
    following.clock = script.clock
    again = goodput([*script.lines[:-1], *following.line("start", 5).lines])
    assert again.seconds["step"] == 20 and again.seconds["lost"] == 20 + 24 + 8
    assert (again.steps, again.steps_lost) == (12, 7)


def test_a_stop_for_bad_numbers_loses_what_was_not_saved():
    script = run(Script()).line("budget_spent", 10, {"action": "stop"}, lost=16)
    script.down(4).line("start", 5, start=8)
    report = script.report()
    want = {"step": 20, "lost": 20 + 16, "start": 16, "down": 4}
    assert buckets(report) == ONE_RUN | want
    assert (report.steps, report.steps_lost) == (10, 5)


def test_after_a_training_was_done_nothing_is_down():
    script = run(Script()).line("done", 10).down(10_000).line("start", 10, start=8)
    assert buckets(script.report()) == ONE_RUN | {"start": 16}
    script = run(Script()).line("stop", 10, checkpoint=1).down(64)
    script.line("start", 10, start=8)
    want = {"start": 16, "down": 64, "checkpoint": 2}
    assert buckets(script.report()) == ONE_RUN | want


@pytest.mark.parametrize("seconds", [-86_400, 86_400])
def test_a_wall_clock_that_jumps_changes_nothing_inside_a_run(seconds):
    script = run(Script())
    script.clock.jump(seconds)
    script.line("steps", 12, step=8)
    # The next run goes by the clock as it is now.
    report = run(script.down(50), first=5).report()
    assert buckets(report) == TWO_RUNS | {"step": 60, "lost": 28, "down": 50}


def test_a_gap_between_runs_is_not_negative():
    script = run(Script())
    script.clock.jump(-3600)
    report = run(script.down(100), first=5).report()
    assert report.seconds["down"] == 0 and report.wall_seconds == 2 * 85


@pytest.mark.parametrize(
    "text",
    ['{"event": "steps", "st', "[1]", "{}", '{"event": "a", "spent": []}', "\x1b[2J"],
)
def test_a_bad_line_is_counted_and_passed_over(text):
    script = run(Script())
    want = script.report()
    script.lines.insert(3, text)
    report = script.report()
    assert report.bad_lines == 1
    report.bad_lines = 0
    assert report == want


@pytest.mark.slow
def test_the_buckets_of_a_training_are_those_of_a_script(
    tmp_path, monkeypatch, no_arithmetic
):
    """Everything takes as long as it says, on a clock that nothing else moves.

    The first run is killed (an exception that nobody catches ends it without a word)
    before step 8, its last checkpoint is that of step 4.
    """
    clock, want = Clock(), Counter()

    def take(seconds, bucket):
        clock.advance(seconds)
        want[bucket] += seconds

    seen = {"runs": 0, "waits": 0}
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL,
        training={
            "steps": 10,
            "log_every_steps": 1,
            "checkpoint_every_steps": 4,
            "sample_every_steps": 3,
        },
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    first_state, save, wait = loop.first_state, Checkpointer.save, Checkpointer.wait
    step_fn = loop.compile_train_step(cfg, mesh)

    def scripted_first_state(*args):
        take(11, "start")
        state = first_state(*args)
        seen["calls"] = seen["previews"] = seen["waits"] = 0
        return state

    def scripted_step(state, batch):
        state, metrics = jax.block_until_ready(step_fn(state, batch))
        seen["calls"] += 1
        step = int(state.step)
        if seen["calls"] == 1:
            take(20, "compile")
        elif seen["runs"] == 1 and step > 4:
            # The line of the sixth is written once the seventh is on its way.
            take(2, "lost")
        else:
            take(2, "step")
        return state, metrics

    def scripted_save(*args):
        take(5, "checkpoint")
        save(*args)

    def scripted_preview(*args):
        seen["previews"] += 1
        first = seen["previews"] == 1
        take(30 if first else 7, "compile" if first else "evaluation")

    def scripted_batch(taken):
        if seen["runs"] == 1 and taken == 8:
            take(13, "down")
            raise SystemExit("killed")
        take(3 if taken % 3 == 0 else 0, "input_wait")
        if taken == 6:
            clock.jump(-7200)

    def scripted_wait(self):
        seen["waits"] += 1
        # Closing waits, too: of the first run unseen, of the second after "done".
        if (seen["runs"], seen["waits"]) == (2, 1):
            take(9, "checkpoint")
        wait(self)

    monkeypatch.setattr(loop, "first_state", scripted_first_state)
    monkeypatch.setattr(loop, "compile_train_step", lambda *args: scripted_step)
    monkeypatch.setattr(loop, "save_preview", scripted_preview)
    monkeypatch.setattr(Checkpointer, "save", scripted_save)
    monkeypatch.setattr(Checkpointer, "wait", scripted_wait)

    def train():
        seen["runs"] += 1
        batches = tiny.Batches(cfg, mesh)
        batches.hook = scripted_batch
        stopwatch = Stopwatch(clock.monotonic, clock.wall)
        preview = functools.partial(tiny.batch, cfg)
        loop.train(cfg, str(tmp_path), batches, mesh, preview, stopwatch)

    with pytest.raises(SystemExit):
        train()
    take(100, "down")
    clock.restart()
    train()
    report = goodput((tmp_path / "events.jsonl").read_text().splitlines())
    assert report.seconds == {bucket: want[bucket] for bucket in BUCKETS}
    assert report.wall_seconds == sum(want.values())
    # Steps 1 to 6, then 5 to 10.
    assert (report.steps, report.steps_lost, report.runs) == (12, 2, 2)
