"""`train --distributed` with real processes, found as Slurm's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.test_doors import ROOT, TINY, door, environment, error

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
        *(sys.executable, "-m", "imagen_jax.train", "--distributed"),
        *("--config=configs/tiny.py:base", f"--workdir={workdir}"),
        *(f"--config.data.records={records}", *TINY),
        *("--config.training.sample_every_steps=0", "--config.text.length=4"),
        *("--config.training.log_every_steps=1", *more),
    ]


def start(command: list[str], logs) -> list[subprocess.Popen]:
    """Two processes on this host, told apart as Slurm does it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
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
        with open(f"{logs}-{process}", "w") as log:
            found.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
            )
    return found


def ends(processes: list[subprocess.Popen]) -> list[int]:
    try:
        return [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_all_at_the_same_step(tmp_path, records):
    run = tmp_path / "run"
    processes = start(command(run, records, STEPS_UNTIL_KILLED), tmp_path / "a")
    for _ in range(1800):
        if (run / "metrics.jsonl").exists() or processes[0].poll() is not None:
            break
        time.sleep(0.1)
    os.kill(processes[1].pid, signal.SIGTERM)
    logs = [tmp_path / f"a-{i}" for i in range(2)]
    assert ends(processes) == [3, 3], [log.read_text()[-2000:] for log in logs]
    stops = [log.read_text().split("at step ")[1].split(",")[0] for log in logs]
    assert stops[0] == stops[1]
    stop = int(stops[0])
    assert rows(run / "events.jsonl")[-1]["event"] == "stop"
    assert (run / "checkpoints" / str(stop)).is_dir()

    more = f"--config.training.steps={stop + 2}"
    assert ends(start(command(run, records, more), tmp_path / "b")) == [0, 0]
    assert [row["step"] for row in rows(run / "metrics.jsonl")][-2:] == [
        stop + 1,
        stop + 2,
    ]


def test_a_process_that_finds_no_others_says_so(tmp_path, records):
    done = subprocess.run(
        command(tmp_path / "run", records),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "leave --distributed out" in error(done)
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_is_not_waited_for(tmp_path, records):
    more = "--start_timeout_seconds=2"
    processes = start(command(tmp_path / "run", records, more), tmp_path / "a")
    processes[1].kill()
    assert ends(processes)[0] not in (0, 3)
    assert "DEADLINE_EXCEEDED" in (tmp_path / "a-0").read_text()
