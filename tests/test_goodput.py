"""The door that tells where the time went: what it reads, what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imagen_jax.errors import UserError
from imagen_jax.goodput import read_goodput, table
from imagen_jax.training.metrics import MetricWriter, Stopwatch
from tests import tiny
from tests.clock import Clock

ROOT = Path(__file__).parents[1]


def write(workdir):
    """A run of which 60 of 80 s were steps."""
    clock = Clock()
    stopwatch = Stopwatch(clock.monotonic, clock.wall)
    writer = MetricWriter(str(workdir), stopwatch, tiny.stage())
    clock.advance(12)
    writer.event("start", 0)
    stopwatch.switch("step")
    clock.advance(60)
    writer.event("steps", 3000)
    with stopwatch.bucket("checkpoint"):
        clock.advance(8)
    writer.event("checkpoint", 3000)
    writer.close()


def test_a_line_that_a_kill_has_cut(tmp_path):
    """It is counted; the run that comes next begins a line of its own."""
    write(tmp_path)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "steps", "st')
    report = read_goodput(str(tmp_path))
    assert report.wall_seconds == 80 and report.bad_lines == 1
    assert "passed over: 1 lines" in table(report)
    write(tmp_path)
    again = read_goodput(str(tmp_path))
    assert (again.runs, again.bad_lines) == (2, 1)


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff", b"{"])
def test_no_events_are_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "events.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="events.jsonl does not exist or tells of no"):
        read_goodput(str(tmp_path))


def test_the_door(tmp_path):
    write(tmp_path)
    path = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "imagen_jax.goodput"),
            *(f"--workdir={tmp_path}", f"--json={path}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    cells = {line[:12].strip(): line[12:].split() for line in lines[:11]}
    assert cells["step"] == ["60.0", "75.0%"] and cells["start"] == ["12.0", "15.0%"]
    assert cells["checkpoint"] == ["8.0", "10.0%"] and cells["wall time"] == ["80.0"]
    assert cells["input wait"] == ["0.0", "0.0%"]
    assert "goodput: 75.0%" in lines
    assert "steps done: 3,000, of these lost: 0" in lines
    assert "last event: 'checkpoint' at step 3,000" in lines
    report = json.loads(path.read_text())
    assert report["goodput"] == 0.75 and report["wall_seconds"] == 80
    assert report["seconds"]["step"] == 60 and report["steps"] == 3000
