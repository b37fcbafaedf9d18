"""`train --distributed` with real processes, found as Slurm's."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from imagen_jax.processes import roll_call
from tests.test_doors import ROOT, TINY, door, environment, error

# TINY has no attention, whose keys' bias has no gradient but for rounding, which Adam
# makes as large as any other's: two orders of sums have nothing in common there.
STEPS_UNTIL_KILLED = "--config.training.steps=1000000"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed") / "records.npz"
    words = ("--source=shapes:8", "--image_size=16", "--text_length=4")
    done = door("prepare", *words, f"--output={path}")
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def command(workdir, records, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "imagen_jax.train"),
        *("--config=configs/tiny.py:base", f"--workdir={workdir}"),
        *(f"--config.data.records={records}", *TINY),
        *("--config.training.sample_every_steps=0", "--config.text.length=4"),
        *("--config.training.log_every_steps=1", *more),
    ]


@pytest.fixture
def start():
    """Starts processes, of which none outlives the test."""
    started = []

    def run(*args) -> list[subprocess.Popen]:
        found = start_processes(*args)
        started.extend(found)
        return found

    yield run
    for process in started:
        process.kill()
        process.wait()


def start_processes(command: list[str], logs, count: int = 2) -> list[subprocess.Popen]:
    """On this host, told apart as Slurm does it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for process in range(count):
        env = environment() | {
            "JAX_COORDINATOR_PORT": str(port),
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(process),
            "SLURM_LOCALID": str(process),
        }
        with open(f"{logs}-{process}", "w") as log:
            found.append(
                subprocess.Popen(
                    [*command, "--distributed"],
                    cwd=ROOT,
                    env=env,
                    stdout=log,
                    stderr=log,
                )
            )
    return found


def ends(processes: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=400) for process in processes]


def rows(path) -> list[dict]:
    """Of a file of JSON lines; one that is being written is left out."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def until_it_trains(run, steps: int, processes) -> None:
    """Returns when `run` has logged a step beyond `steps`, or a process has ended."""
    for _ in range(1800):
        logged = run / "metrics.jsonl"
        if logged.exists() and [r for r in rows(logged) if r["step"] > steps]:
            break
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.1)


TWENTY_STEPS = (
    "--config.training.steps=20",
    "--config.training.checkpoint_every_steps=20",
)


@pytest.fixture(scope="module")
def losses_of_one(tmp_path_factory, records):
    """Of twenty steps of one process with one device."""
    run = tmp_path_factory.mktemp("one") / "run"
    done = subprocess.run(
        command(run, records, *TWENTY_STEPS),
        cwd=ROOT,
        env=environment() | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [row["loss"] for row in rows(run / "metrics.jsonl")]
    assert len(found) == 20
    return found


# The door, which notes what of a folder Python opens for writing, makes and moves.
WITH_WRITES = """
import os, sys
from imagen_jax import cli, train
folder, log = sys.argv.pop(1), open(sys.argv.pop(1) + os.environ["SLURM_PROCID"], "w")

def note(event, args):
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        path = args[1] if event == "os.rename" else args[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
            print(event, os.path.relpath(path, folder), file=log, flush=True)

sys.addaudithook(note)
train.define_flags()
cli.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one(tmp_path, records, losses_of_one, start, count):
    """The same examples and noise in another order of sums: 1e-5 relative.

    And only process 0 writes what all share; Orbax has a file of its own for each.
    """
    run = tmp_path / "run"
    door = command(run, records, *TWENTY_STEPS)[3:]
    call = [sys.executable, "-c", WITH_WRITES, str(run), str(tmp_path / "w"), *door]
    ended = ends(start(call, tmp_path / "log", count))
    logs = [(tmp_path / f"log-{i}").read_text()[-2000:] for i in range(count)]
    assert ended == [0] * count, logs
    found = [row["loss"] for row in rows(run / "metrics.jsonl")]
    np.testing.assert_allclose(found, losses_of_one, rtol=1e-5)
    assert (run / "checkpoints" / "20").is_dir()
    written = [(tmp_path / f"w{i}").read_text().splitlines() for i in range(count)]
    assert "open metrics.jsonl" in written[0]
    for process in range(1, count):
        shared = [x for x in written[process] if not x.endswith(f"process_{process}")]
        assert shared == [] and written[process]


# The door, which writes down the ids that each of its batches has here.
WITH_IDS = """
import sys
import jax
from imagen_jax import cli, train

class Noted:
    def __init__(self, stream, file):
        self.stream, self.file, self.taken = stream, file, 0
        self.get_state, self.set_state = stream.get_state, stream.set_state
    def __next__(self):
        batch = next(self.stream)
        ids = [n for s in batch.id.addressable_shards for n in s.data.tolist()]
        print(*ids, file=self.file, flush=True)
        return batch

open_records, path = train.open_records, sys.argv.pop(1)
train.open_records = lambda cfg, mesh: Noted(
    open_records(cfg, mesh), open(f"{path}-{jax.process_index()}", "w")
)
train.define_flags()
cli.run(train.main)
"""


@pytest.mark.slow
def test_other_processes_midway(tmp_path, records, start):
    """1, 2, 1 of them: the same examples, losses up to the order of sums."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    alone = environment() | {"XLA_FLAGS": ""}

    def call(run, ids, steps):
        every = "--config.training.checkpoint_every_steps=3"
        last = f"--config.training.steps={steps}"
        given = command(run, records, every, last)
        return [sys.executable, "-c", WITH_IDS, str(tmp_path / ids), *given[3:]]

    def one(*args):
        done = subprocess.run(call(*args), cwd=ROOT, env=alone, capture_output=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return ids_of(f"{args[1]}-0")

    def ids_of(name):
        lines = (tmp_path / name).read_text().splitlines()
        return [[int(n) for n in line.split()] for line in lines]

    want = one(whole, "whole", 9)
    found = one(parts, "first", 3)
    ended = ends(start(call(parts, "second", 6), tmp_path / "log"))
    assert ended == [0, 0], [
        (tmp_path / f"log-{i}").read_text()[-2000:] for i in (0, 1)
    ]
    found += [
        a + b for a, b in zip(ids_of("second-0"), ids_of("second-1"), strict=True)
    ]
    found += one(parts, "third", 9)
    assert found == want and len(want) == 9 and len(want[0]) == 4
    logged = [
        [r["loss"] for r in rows(run / "metrics.jsonl")] for run in (parts, whole)
    ]
    np.testing.assert_allclose(*logged, rtol=1e-4)
    ends_at = [parameters(run / "checkpoints" / "9") for run in (parts, whole)]
    for x, y in zip(*ends_at, strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)


def parameters(folder) -> list[np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder / "train")["params"]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


# Of two processes the second lives, and does not come.
HANGS = """
import sys, time
import jax
from imagen_jax import processes
from imagen_jax.barrier import wait_for_all
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with processes.losses_named():
    wait_for_all("begin")
    if jax.process_index():
        time.sleep(1000)
    wait_for_all("save", 2)
"""


def test_a_process_that_hangs_is_not_waited_for():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    call = [sys.executable, "-c", HANGS, address]
    streams = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    first, second = (
        subprocess.Popen([*call, str(i)], env=environment(), **streams) for i in (0, 1)
    )
    try:
        _, told = first.communicate(timeout=200)
    finally:
        second.kill()
        second.communicate()
        first.kill()
    assert first.returncode == 4
    assert "error: process 1 of 2 did not come within 2 s to save" in told


@pytest.mark.slow
def test_a_signal_to_one_process_saves_all_at_the_same_step(tmp_path, records, start):
    """And the resumed run, of which a process is lost, ends with its name."""
    run = tmp_path / "run"
    processes = start(command(run, records, STEPS_UNTIL_KILLED), tmp_path / "a")
    until_it_trains(run, 0, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    logs = [tmp_path / f"a-{i}" for i in range(2)]
    assert ends(processes) == [3, 3], [log.read_text()[-2000:] for log in logs]
    stops = [log.read_text().split("at step ")[1].split(",")[0] for log in logs]
    assert stops[0] == stops[1]
    stop = int(stops[0])
    assert rows(run / "events.jsonl")[-1]["event"] == "stop"
    assert (run / "checkpoints" / str(stop)).is_dir()

    processes = start(command(run, records, STEPS_UNTIL_KILLED), tmp_path / "b")
    until_it_trains(run, stop, processes)
    steps = [row["step"] for row in rows(run / "metrics.jsonl")]
    assert steps[: stop + 1] == list(range(1, stop + 2))
    processes[1].kill()
    assert ends(processes) == [4, -signal.SIGKILL]
    log = (tmp_path / "b-0").read_text()
    assert log.count("error: ") == 1 and "error: process 1 of 2 is gone" in log


def test_a_process_that_finds_no_others_says_so(tmp_path, records):
    done = subprocess.run(
        [*command(tmp_path / "run", records), "--distributed"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "leave --distributed out" in error(done)
    assert not (tmp_path / "run").exists()


def call_the_roll(present: list[int], count: int, seconds: float) -> list:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [pool.submit(roll_call, address, count, i, seconds) for i in present]
        found = [call.result() for call in calls]
    for _, lines in found:
        for line in lines.values():
            line.close()
    return [missing for missing, _ in found]


def test_who_does_not_come_is_named():
    assert call_the_roll([0, 1, 2, 3], 4, 60) == [[]] * 4
    assert call_the_roll([3, 0], 5, 1) == [[1, 2, 4]] * 2
    assert call_the_roll([1, 2], 3, 1) == [[0]] * 2


WATCHING = """
import sys, time
from imagen_jax import processes
index, address = int(sys.argv[1]), sys.argv[2]
missing, lines = processes.roll_call(address, 4, index, 60)
processes.watch(lines, 4)
print(missing, flush=True)
with processes.losses_named():
    time.sleep(0 if index == 3 else 60)
print("out", flush=True)
time.sleep(60)
"""


def test_a_killed_process_is_named_by_all_others():
    """At once; one that has said good-bye before is not missed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHING, str(i), address],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    try:
        assert [p.stdout.readline() for p in started] == ["[]\n"] * 4
        assert started[3].stdout.readline() == "out\n"
        started[3].kill()
        assert started[3].wait() == -signal.SIGKILL
        time.sleep(1)
        assert [p.poll() for p in started[:3]] == [None] * 3
        started[2].kill()
        assert ends(started[:3]) == [4, 4, -signal.SIGKILL]
        for process in started[:2]:
            assert "error: process 2 of 4 is gone" in process.stderr.read()
    finally:
        for process in started:
            process.kill()


def test_a_process_that_does_not_come_is_not_waited_for(tmp_path, records, start):
    more = "--start_timeout_seconds=2"
    processes = start(command(tmp_path / "run", records, more), tmp_path / "a")
    processes[1].kill()
    assert ends(processes)[0] == 4
    log = (tmp_path / "a-0").read_text()
    assert "error: --distributed: process 1 of 2 did not come within" in log
    assert "Traceback" not in log
