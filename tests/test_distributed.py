"""`train --distributed` with real processes, found as Slurm's."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from imagen_jax.prepare import prepare
from tests.test_doors import ROOT, TINY, environment, error, once

# TINY has no attention, whose keys' bias has no gradient but for rounding, which Adam
# makes as large as any other's: two orders of sums have nothing in common there.
STEPS_UNTIL_KILLED = "--config.training.steps=1000000"
# With this status JAX ends a process that has lost another; the shell's 134.
ABORTED = -signal.SIGABRT


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("distributed") / "records.npz")
    prepare("shapes:8", path, text_length=4, image_size=16, progress=False)
    return path


def flags(workdir, records, *more: str) -> list[str]:
    return [
        *("--config=configs/tiny.py:base", f"--workdir={workdir}"),
        f"--config.data.records={records}",
        *once(*TINY, "--config.training.sample_every_steps=0", *more),
        *("--config.text.length=4", "--config.training.log_every_steps=1"),
        *("--config.data.heldout_share=0.2", "--config.training.heldout_images=8"),
    ]


DOOR = [sys.executable, "-m", "imagen_jax.train"]


@pytest.fixture
def start(tmp_path):
    """Starts two processes, told apart as Slurm does it; none outlives the test."""
    started = []

    def run(command: list[str], log: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for process in range(2):
            env = environment() | {
                "JAX_COORDINATOR_PORT": str(port),
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(process),
                "SLURM_LOCALID": str(process),
            }
            with open(tmp_path / f"{log}-{process}", "w") as out:
                started.append(
                    subprocess.Popen(
                        [*command, "--distributed"],
                        cwd=ROOT,
                        env=env,
                        stdout=out,
                        stderr=out,
                    )
                )
        return started[-2:]

    yield run
    for process in started:
        process.kill()
        process.wait()


def ends(processes: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=400) for process in processes]


def logs(tmp_path, name: str) -> list[str]:
    return [(tmp_path / f"{name}-{process}").read_text() for process in (0, 1)]


def rows(path) -> list[dict]:
    """The lines of a file of JSON lines; one that is being written is left out."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def losses(run, name: str = "loss") -> list[float]:
    return [row[name] for row in rows(run / "metrics.jsonl") if name in row]


def until_it_trains(run, steps: int, processes) -> None:
    """Returns when `run` has logged a step beyond `steps`, or a process has ended."""
    for _ in range(1800):
        logged = run / "metrics.jsonl"
        if logged.exists() and [r for r in rows(logged) if r["step"] > steps]:
            break
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.1)


# The door, which notes the ids of its batches that are here, and what of a folder
# Python opens for writing, makes and moves.
NOTING = """
import importlib, os, sys
from collections.abc import Iterator
import jax
from imagen_jax import cli
from imagen_jax.api import run
folder, path = sys.argv.pop(1), sys.argv.pop(1) + os.environ.get("SLURM_PROCID", "0")
writes, ids = open(path + ".writes", "w"), open(path + ".ids", "w")

def note(event, args):
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        path = args[1] if event == "os.rename" else args[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
            print(event, os.path.relpath(path, folder), file=writes, flush=True)

class Noted(Iterator):
    def __init__(self, stream):
        self.stream = stream
        self.get_state, self.set_state = stream.get_state, stream.set_state
    def __next__(self):
        batch = next(self.stream)
        here = [n for s in batch.id.addressable_shards for n in s.data.tolist()]
        print(*here, file=ids, flush=True)
        return batch

sys.addaudithook(note)
open_records = run.open_records
run.open_records = lambda cfg, mesh: Noted(open_records(cfg, mesh))
train = importlib.import_module("imagen_jax.train")
train.define_flags()
cli.run(train.main)
"""


def noting(run, records, notes, *more: str) -> list[str]:
    every = "--config.training.checkpoint_every_steps=3"
    command = [sys.executable, "-c", NOTING, str(run), str(notes)]
    return [*command, *flags(run, records, every, *more)]


def train_alone(run, records, notes, steps: int) -> None:
    done = subprocess.run(
        noting(run, records, notes, f"--config.training.steps={steps}"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def ids(notes, process: int = 0) -> list[list[int]]:
    lines = notes.with_name(f"{notes.name}{process}.ids").read_text().splitlines()
    return [[int(n) for n in line.split()] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, records):
    """A run of nine steps in one process, and what it noted."""
    folder = tmp_path_factory.mktemp("one")
    train_alone(folder / "run", records, folder / "notes", 9)
    return folder / "run", folder / "notes"


@pytest.mark.slow
def test_other_processes_midway(tmp_path, records, whole, start):
    """1, 2, 1 of them: the same examples, losses up to the order of sums.

    Only process 0 writes what all share; Orbax has a file of its own for each. When one
    of the two is lost, JAX ends the other.
    """
    run, second, third = (tmp_path / name for name in ("run", "second", "third"))
    shutil.copytree(whole[0], run)
    for step in (6, 9):
        shutil.rmtree(run / "checkpoints" / str(step))
    heartbeat = "--heartbeat_timeout_seconds=10"
    command = noting(run, records, second, STEPS_UNTIL_KILLED, heartbeat)
    processes = start(command, "log")
    until_it_trains(run, 9, processes)
    processes[1].kill()
    assert ends(processes) == [ABORTED, -signal.SIGKILL], logs(tmp_path, "log")
    assert "Task 1 heartbeat timeout" in logs(tmp_path, "log")[0]
    written = [
        second.with_name(f"second{i}.writes").read_text().splitlines() for i in (0, 1)
    ]
    assert "open metrics.jsonl" in written[0]
    assert written[1] and all(line.endswith("process_1") for line in written[1])
    np.testing.assert_allclose(losses(run)[3:9], losses(whole[0])[3:], rtol=1e-5)
    for name in ("heldout_loss", "heldout_ema_loss"):
        # After steps 3, 6 and 9; the last two by two processes.
        want = losses(whole[0], name)
        assert len(want) == 3
        np.testing.assert_allclose(losses(run, name)[:3], want, rtol=1e-5)
    both = [a + b for a, b in zip(ids(second, 0), ids(second, 1), strict=False)]
    assert both[:6] == ids(whole[1])[3:] and len(both[0]) == 8

    for path in (run / "checkpoints").iterdir():
        if path.name != "6":
            shutil.rmtree(path)
    train_alone(run, records, third, 9)
    assert ids(third) == ids(whole[1])[6:] and len(ids(third)) == 3
    np.testing.assert_allclose(losses(run)[-3:], losses(whole[0])[6:], rtol=1e-5)
    for x, y in zip(parameters(run), parameters(whole[0]), strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)


def parameters(run) -> list[np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(run / "checkpoints" / "9" / "train")["params"]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_all_at_the_same_step(
    tmp_path, records, whole, start
):
    """Until then they have trained as one."""
    run = tmp_path / "run"
    processes = start([*DOOR, *flags(run, records, STEPS_UNTIL_KILLED)], "a")
    until_it_trains(run, 8, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ends(processes) == [3, 3], logs(tmp_path, "a")
    stops = [log.split("at step ")[1].split(",")[0] for log in logs(tmp_path, "a")]
    assert stops[0] == stops[1]
    assert rows(run / "events.jsonl")[-1]["event"] == "stop"
    assert (run / "checkpoints" / stops[0]).is_dir()
    np.testing.assert_allclose(losses(run)[:9], losses(whole[0]), rtol=1e-5)


@pytest.mark.slow
def test_a_process_that_finds_no_others_says_so(tmp_path, records):
    done = subprocess.run(
        [*DOOR, *flags(tmp_path / "run", records), "--distributed"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "leave --distributed out" in error(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_does_not_come_is_not_waited_for(tmp_path, records, start):
    command = [*DOOR, *flags(tmp_path / "run", records), "--start_timeout_seconds=2"]
    processes = start(command, "a")
    processes[1].kill()
    assert ends(processes) == [ABORTED, -signal.SIGKILL]
    assert "waiting for the other processes, at most 2 s" in logs(tmp_path, "a")[0]


@pytest.mark.slow
def test_processes_share_the_pictures(tmp_path, whole, start):
    """Killed and started again, they make what one makes alone, to the byte."""
    (tmp_path / "prompts").write_text("".join(f"circle {i}\n" for i in range(24)))

    def command(output):
        door = [sys.executable, "-m", "imagen_jax.sample", f"--stage={whole[0]}"]
        more = ["--batch_size=4", "--steps=200", f"--prompts={tmp_path / 'prompts'}"]
        return [*door, *more, f"--output={tmp_path / output}"]

    killed = start([*command("shared"), "--heartbeat_timeout_seconds=10"], "a")
    while len(list((tmp_path / "shared").glob("00[0-9][0-9].png"))) < 4:
        assert all(process.poll() is None for process in killed), logs(tmp_path, "a")
        time.sleep(0.01)
    for process in killed:
        process.kill()
    assert ends(killed) == [-signal.SIGKILL] * 2
    done = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "shared").glob("*.png")
    }
    made = start(command("shared"), "b")
    assert ends(made) == [0, 0], logs(tmp_path, "b")
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert "24 pictures in" in logs(tmp_path, "b")[0]
    subprocess.run(command("alone"), cwd=ROOT, env=environment(), check=True)
    folders = (tmp_path / "shared").iterdir(), (tmp_path / "alone").iterdir()
    shared, alone = ({f.name: f.read_bytes() for f in files} for files in folders)
    for files in (shared, alone):  # it tells the devices of all processes
        described = json.loads(files.pop("job.json"))
        files["asked"] = described["asked"]
    assert shared == alone and len(alone) == 24 + 3
