"""The door that tells where the time went: what it reads, what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imagen_jax import goodput as metrics
from imagen_jax.errors import UserError
from imagen_jax.training.goodput import Stopwatch
from imagen_jax.training.metrics import MetricWriter
from tests.clock import Clock

ROOT = Path(__file__).parents[1]


def write(workdir):
    """A run of which 60 of 80 s were steps."""
    clock = Clock()
    stopwatch = Stopwatch(clock.monotonic, clock.wall)
    writer = MetricWriter(str(workdir), stopwatch)
    clock.advance(12)
    writer.event("start", 0)
    stopwatch.train_from(0, lambda: None)
    clock.advance(60)
    writer.event("steps", 3000)
    with stopwatch.bucket("checkpoint"):
        clock.advance(8)
    writer.event("checkpoint", 3000)
    writer.close()


def door(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "imagen_jax.goodput", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_table(tmp_path):
    write(tmp_path)
    lines = metrics.table(metrics.read_goodput(str(tmp_path))).splitlines()
    cells = {line[:12].strip(): line[12:].split() for line in lines[:12]}
    assert cells["step"] == ["60.0", "75.0%"] and cells["start"] == ["12.0", "15.0%"]
    assert cells["checkpoint"] == ["8.0", "10.0%"] and cells["wall time"] == ["80.0"]
    assert cells["input wait"] == ["0.0", "0.0%"]
    assert lines[12] == "goodput: 75.0%"
    assert "steps done: 3,000, of these lost: 0" in lines
    assert "last event: 'checkpoint' at step 3,000" in lines


def test_a_line_that_a_kill_has_cut(tmp_path):
    """It is named; the run that comes next begins a line of its own."""
    write(tmp_path)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "steps", "st')
    report = metrics.read_goodput(str(tmp_path))
    assert report.wall_seconds == 80 and report.bad_lines == 1
    assert "line 4 is no JSON" in metrics.table(report)
    write(tmp_path)
    again = metrics.read_goodput(str(tmp_path))
    assert (again.runs, again.bad_lines) == (2, 1)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\x00\xff", b"{", "pipe"])
def test_no_events_are_an_error(tmp_path, content):
    path = tmp_path / "events.jsonl"
    if content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"has no events.jsonl|tells of no event"):
        metrics.read_goodput(str(tmp_path))


def test_a_line_without_an_end_is_read_in_parts(tmp_path):
    write(tmp_path)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write("x" * (3 * 2**20))
    assert metrics.read_goodput(str(tmp_path)).bad_lines == 3


def test_the_door(tmp_path):
    write(tmp_path)
    path = tmp_path / "report.json"
    done = door(f"--workdir={tmp_path}", f"--json={path}")
    assert done.returncode == 0 and "goodput: 75.0%" in done.stdout, done.stderr
    report = json.loads(path.read_text())
    assert report["goodput"] == 0.75 and report["wall_seconds"] == 80
    assert report["seconds"]["step"] == 60 and report["steps"] == 3000
    done = door(f"--workdir={tmp_path / 'no'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "has no events.jsonl: give the --workdir" in done.stderr
