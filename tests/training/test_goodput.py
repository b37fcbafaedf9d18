"""Goodput's buckets against scripts of what took how long."""

import json
import math
import random
from collections import Counter

import jax
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.goodput import BUCKETS, goodput
from imagen_jax.training.stopwatch import Stopwatch
from tests import tiny
from tests.clock import Clock


class Script:
    """Lines of an events.jsonl, and beside them what they should add up to."""

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
    script.line("checkpoint", first + 5, step=4, checkpoint=1)
    script.line("steps", first + 8, step=12, input_wait=2)
    return script.line("steps", first + 10, step=8)


def buckets(report):
    assert list(report.seconds) == list(BUCKETS)
    return {name: seconds for name, seconds in report.seconds.items() if seconds}


ONE_RUN = {"start": 8, "compile": 32, "step": 40, "input_wait": 4, "checkpoint": 1}


def test_a_run_is_what_its_lines_tell():
    report = run(Script()).line("done", 10, checkpoint=3).report()
    assert buckets(report) == ONE_RUN | {"checkpoint": 4}
    assert (report.wall_seconds, report.goodput) == (88, 40 / 88)
    assert (report.steps, report.steps_lost, report.runs) == (10, 0, 1)
    assert (report.last_event, report.last_step) == ("done", 10)
    assert not report.notes and not report.bad_lines


def test_a_killed_run_loses_what_came_after_its_checkpoint():
    """And one that is killed again before it saves loses all."""
    script = run(run(Script()).down(100), first=5).down(200)
    script.line("start", 10, start=8).line("done", 10)
    report = script.report()
    want = dict(Counter(ONE_RUN) + Counter(ONE_RUN))
    # Of each run the five steps after the checkpoint.
    want |= {"step": 40, "lost": 40, "start": 24, "down": 300}
    assert buckets(report) == want
    assert (report.steps, report.steps_lost, report.runs) == (20, 10, 3)
    assert report.wall_seconds == 2 * 85 + 300 + 8


def test_a_damaged_checkpoint_loses_what_came_before_it():
    script = run(Script()).down(1).line("start", 2, start=8)
    script.line("steps", 4, step=8).down(1).line("start", 2, start=8)
    report = script.report()
    # Two of the four steps of a line are half of its seconds.
    assert report.seconds["step"] == 8 and report.seconds["lost"] == 32 + 8
    assert (report.steps, report.steps_lost) == (12, 10)


def test_a_rollback_loses_steps_and_its_own_time():
    script = run(Script())
    # The devices stood still from step 9 on; the host heard of it at 10.
    script.line("budget_spent", 9, {"action": "rollback"}, lost=16)
    script.line("rollback", 9, {"to": 5}, lost=8)
    script.line("steps", 11, step=8).line("done", 11)
    report = script.report()
    assert buckets(report) == ONE_RUN | {"step": 28, "lost": 20 + 24}
    assert (report.steps, report.steps_lost) == (11, 4)
    # Killed before it saves, it loses steps 10 and 11, and those of before only once.
    again = goodput([*script.lines[:-1], *_started_again(script, 5)])
    assert again.seconds["step"] == 20 and again.seconds["lost"] == 20 + 24 + 8
    assert (again.steps, again.steps_lost) == (11, 6)


def _started_again(script, step):
    following = Script()
    following.clock = script.clock
    return following.line("start", step).lines


def test_a_stop_for_bad_numbers_loses_what_was_not_saved():
    script = run(Script()).line("budget_spent", 9, {"action": "stop"}, lost=16)
    script.down(4).line("start", 5, start=8)
    report = script.report()
    want = {"step": 20, "lost": 20 + 16, "start": 16, "down": 4}
    assert buckets(report) == ONE_RUN | want
    assert (report.steps, report.steps_lost) == (9, 4)


def test_after_a_training_was_done_nothing_is_down():
    script = run(Script()).line("done", 10).down(10_000).line("start", 10, start=8)
    assert buckets(script.report()) == ONE_RUN | {"start": 16}
    script = run(Script()).line("stop", 10, checkpoint=1).down(64)
    script.line("start", 10, start=8)
    want = {"start": 16, "down": 64, "checkpoint": 2}
    assert buckets(script.report()) == ONE_RUN | want


@pytest.mark.parametrize("seconds", [-86_400, -3, 3, 86_400])
def test_a_wall_clock_that_jumps_changes_nothing_inside_a_run(seconds):
    script = Script()
    run(script)
    script.clock.jump(seconds)
    script.line("steps", 12, step=8)
    # The next run goes by the clock as it is now.
    run(script.down(50), first=5)
    report = script.report()
    want = dict(Counter(ONE_RUN) + Counter(ONE_RUN))
    assert buckets(report) == want | {"step": 60, "lost": 28, "down": 50}
    (note,) = report.notes
    assert f"line 7: the wall clock jumped by {seconds:+,.1f} s" in note


def test_a_gap_that_is_negative_is_none_and_told():
    script = run(Script())
    script.clock.jump(-3600)
    run(script.down(100), first=5)
    report = script.report()
    assert report.seconds["down"] == 0 and report.wall_seconds == 2 * 85
    (note,) = report.notes
    assert "line 7" in note and "begins 3,500.0 s before the end" in note


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"event": "steps", "st', "is no JSON: '{\"event"),
        ("[" * 100_000, "is no JSON"),
        ("\x1b[2J", "is no JSON: '\\x1b"),
        ("[1]", "is no event"),
        ("{}", "has no event"),
        ('{"event": 7}', "has no event"),
        ('{"event": "a"}', "has no spent seconds"),
        ('{"event": "a", "spent": {"fun": 1}}', "has no spent seconds"),
        ('{"event": "a", "spent": []}', "has no spent seconds"),
        ('{"event": "a", "spent": {}}', "has no step"),
        ('{"event": "a", "spent": {}, "step": 1.5}', "has no step"),
        ('{"event": "a", "spent": {}, "step": true}', "has no step"),
        ('{"event": "a", "spent": {}, "step": -1}', "has a step of -1"),
        ('{"event": "a", "spent": {}, "step": 1, "seconds": "x"}', "has no seconds"),
        ('{"event": "a", "spent": {}, "step": 1, "seconds": NaN}', "seconds of nan"),
        ('{"event": "a", "spent": {}, "step": 1, "seconds": 1e999}', "seconds of inf"),
        ('{"event": "a", "spent": {}, "step": 1, "seconds": 1}', "has no monotonic"),
    ],
)
def test_a_bad_line_is_named_and_passed_over(text, fault):
    script = run(Script())
    want = script.report()
    script.lines.insert(3, text)
    report = script.report()
    assert report.bad_lines == 1 and fault in report.faults[0]
    assert report.faults[0].startswith("line 4 ")
    report.bad_lines, report.faults = 0, []
    assert report == want


def test_what_a_bad_line_told_is_unknown():
    script = run(Script())
    script.lines[2] = script.lines[2][:-9]
    report = script.report()
    assert buckets(report) == ONE_RUN | {"step": 24, "input_wait": 2, "unknown": 18}
    assert report.wall_seconds == 85 and report.bad_lines == 1


def test_a_line_cannot_spend_more_than_there_was():
    script = run(Script())
    script.lines.append(script.lines[-1])
    report = script.report()
    assert report.faults == ["line 7 spends 8 s of 0"]
    assert buckets(report) == ONE_RUN


def test_a_run_whose_start_was_cut_is_one():
    script = run(run(Script()).down(100), first=5)
    script.lines[6] = script.lines[6][:20]
    report = script.report()
    assert report.runs == 2 and report.steps_lost == 5
    # What the start took is not told, and so it was down.
    assert (report.seconds["start"], report.seconds["down"]) == (8, 108)
    assert "line 8: the start of its run is missing" in report.notes[0]


def test_whatever_is_damaged_adds_up():
    """No error, no number that is none, and no second twice."""
    script = run(run(Script()).down(100), first=5).line("stop", 15, checkpoint=1)
    text, whole = "\n".join(script.lines), script.report()
    draw = random.Random(0)
    for _ in range(500):
        damaged = list(text)
        for _ in range(draw.randint(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.choice('0123456789{}",:\n-eE')
        report = goodput("".join(damaged).splitlines())
        assert all(0 <= seconds < math.inf for seconds in report.seconds.values())
        assert 0 <= report.goodput <= 1 and 0 <= report.steps_lost <= report.steps
    halves = [goodput(script.lines[:n]).wall_seconds for n in range(15)]
    assert halves == sorted(halves) and halves[-1] == whole.wall_seconds


@pytest.mark.slow
def test_the_buckets_of_a_training_are_those_of_a_script(tmp_path, monkeypatch):
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
        number = int(state.step)
        compiles = seen["calls"] == 1
        again = seen["runs"] == 1 and number > 4
        take(
            20 if compiles else 2, "compile" if compiles else again and "lost" or "step"
        )
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
    monkeypatch.setattr(loop, "_preview", scripted_preview)
    monkeypatch.setattr(Checkpointer, "save", scripted_save)
    monkeypatch.setattr(Checkpointer, "wait", scripted_wait)

    def train():
        seen["runs"] += 1
        batches = tiny.Batches(cfg, mesh)
        batches.hook = scripted_batch
        stopwatch = Stopwatch(clock.monotonic, clock.wall)
        loop.train(cfg, str(tmp_path), batches, mesh, tiny.batch(cfg), stopwatch)

    with pytest.raises(SystemExit):
        train()
    take(100, "down")
    clock.restart()
    train()
    report = goodput((tmp_path / "events.jsonl").read_text().splitlines())
    for bucket in BUCKETS:
        assert report.seconds[bucket] == pytest.approx(want[bucket], rel=0.05), bucket
    assert report.seconds == {bucket: want[bucket] for bucket in BUCKETS}
    assert report.wall_seconds == sum(want.values())
    # Steps 1 to 7, then 5 to 10.
    assert (report.steps, report.steps_lost, report.runs) == (13, 3, 2)
    jumps = [note for note in report.notes if "jumped by -7,200.0 s" in note]
    assert len(jumps) == len(report.notes) == 2
