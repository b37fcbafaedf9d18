"""Kills a tiny training at random times, resumes it, and compares it to the bit.

JAX_PLATFORMS=cpu python -m benchmarks.torture [--kills=100] [--seed=0] [--folder=DIR]

A run that nobody kills comes first. Then others are killed and started again until they
are done: with SIGKILL, SIGTERM, Ctrl-C and a second Ctrl-C, while they start, take
steps, save, finalise a checkpoint and end. Each that is done must have the arrays of
the first in its last checkpoint, the same position of its data, and in every line of
metrics.jsonl the same numbers for the same step. Prints what was hit, as a table.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]
UNFINISHED = ".orbax-checkpoint-tmp"
# The smallest network: most of a life is Python's start and JAX's tracing.
STAGE = {
    "model.channels": "(8,)",
    "model.num_res_blocks": "(1,)",
    "model.self_attention": "(False,)",
    "model.text_attention": "(False,)",
    "model.text_conditioning": "mean_pool",
    "text.length": 4,
    "training.batch_size": 4,
    "training.log_every_steps": 1,
    "training.sample_every_steps": 0,
}
# Whichever of them is drawn: SIGKILL, SIGTERM, Ctrl-C, and Ctrl-C twice.
WAYS = ("kill", "term", "int", "int twice")
WEIGHTS = (5, 2, 2, 1)
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
# How a life may end: done all the same, saved, or dead of it.
STATUSES = {
    "kill": (0, -9),
    "term": (0, 3, -15),
    "int": (0, 3, -2),
    "int twice": (0, 3, -2, 130),
}
# When: while it starts, and some time after it has started to train, while a
# checkpoint is unfinished, or after its last is begun.
WHEN = ("start", "steps", "steps", "saving", "saving", "end")
LONGEST_SECONDS = 600


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Of a process on one CPU device that compiles little, and that only once."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Torture:
    """Runs of one training in a folder.

    Attributes:
      hits: how often (way, what was hit, exit status) came.
      faults: what should not have been, one line each.
    """

    def __init__(
        self, folder: pathlib.Path, steps: int, every: int, seed: int, cache=None
    ):
        self.folder, self.steps, self.every = folder, steps, every
        self.random = random.Random(seed)
        self.env = environment(cache or folder / "cache")
        self.hits = collections.Counter()
        self.faults = []
        records = folder / "records.npz"
        words = ("--source=shapes:64", "--image_size=16", "--text_length=4")
        prepare = [sys.executable, "-m", "imagen_jax.prepare", *words]
        subprocess.run(
            [*prepare, f"--output={records}"], cwd=ROOT, env=self.env, check=True
        )
        values = STAGE | {
            "data.records": records,
            "training.steps": steps,
            "training.checkpoint_every_steps": every,
        }
        self.flags = [f"--config.{name}={value}" for name, value in values.items()]
        self.whole = folder / "whole"
        begun = time.monotonic()
        with self.start(self.whole) as process:
            assert process.wait(LONGEST_SECONDS) == 0, self.log(self.whole)
        took = time.monotonic() - begun
        # The first event, "start", is written before the step is compiled or, later,
        # found in the cache; the first checkpoint comes after it.
        times = {}
        for event in lines(self.whole / "events.jsonl"):
            times.setdefault(event["event"], event["seconds"])
        self.training_seconds = times["done"] - times["checkpoint"]
        self.start_seconds = took - self.training_seconds

    def start(self, workdir: pathlib.Path) -> subprocess.Popen:
        """A life of the run; its output is added to `workdir`.log."""
        command = [sys.executable, "-m", "imagen_jax.train"]
        command += ["--config=configs/tiny.py:base", f"--workdir={workdir}"]
        with open(f"{workdir}.log", "a") as log:
            return subprocess.Popen(
                [*command, *self.flags],
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=log,
            )

    def log(self, workdir: pathlib.Path) -> str:
        """What all lives of a run have printed."""
        return pathlib.Path(f"{workdir}.log").read_text()

    def draw(self) -> tuple[str, str]:
        """A way to end a life, and when."""
        return self.random.choices(WAYS, WEIGHTS)[0], self.random.choice(WHEN)

    def until_done(self, workdir: pathlib.Path, plan: list[tuple[str, str]]) -> int:
        """Kills a run as planned; returns how often it was killed, when it is done.

        Args:
          workdir: of a new run.
          plan: of each life how and when it ends; the next one is left to end.
        """
        killed, plan = 0, list(plan)
        while True:
            before = len(lines(workdir / "events.jsonl"))
            printed = len(self.log(workdir)) if before else 0
            process = self.start(workdir)
            way, when = plan.pop(0) if plan else ("", "")
            if way and self.wait_for_a_moment(workdir, process, when, before):
                hit, status = self.kill(workdir, process, way, before)
                if status not in STATUSES[way]:
                    self.faults.append(f"{workdir.name}: {way} gave status {status}")
            else:
                hit, status = "", process.wait(LONGEST_SECONDS)
            told = self.log(workdir)[printed:]
            if hit:
                killed += 1
                self.hits[way, hit, status] += 1
            elif status:
                self.faults.append(f"{workdir.name}: status {status}: {told[-2000:]}")
                return killed
            # Python's own, when it is interrupted while it imports.
            if "Traceback" in told and hit != "start-up":
                self.faults.append(f"{workdir.name}: {told[-2000:]}")
            if status == 0:
                self.compare(workdir)
                return killed

    def wait_for_a_moment(self, workdir, process, when: str, before: int) -> bool:
        """Returns at a random time of the process's life; False if it has ended."""
        if when == "start":
            # The first run compiled; those that follow find that in the cache.
            time.sleep(self.random.uniform(0, self.start_seconds / 3))
            return process.poll() is None
        events = workdir / "events.jsonl"

        def trains():
            own = lines(events)[before:]
            return any(event["event"] != "start" for event in own)

        def saves():
            return trains() and any(unfinished(workdir))

        def ends():
            folder = workdir / "checkpoints"
            return any(folder.glob(f"{self.steps}{UNFINISHED}*"))

        begun = {"steps": trains, "saving": saves, "end": ends}[when]
        while not begun() and process.poll() is None:
            time.sleep(0.003)
        # Short of the end, or most lives would be their run's last.
        steps = self.training_seconds / 4
        longest = {"steps": steps, "saving": 0.3, "end": 1.0}[when]
        time.sleep(self.random.uniform(0, longest))
        return process.poll() is None

    def kill(self, workdir, process, way: str, before: int) -> tuple[str, int]:
        """What was hit, and the exit status."""
        number = SIGNALS.get(way, signal.SIGINT)
        process.send_signal(number)
        if way == "int twice":
            time.sleep(self.random.uniform(0, 0.5))
            process.send_signal(number)
        status = process.wait(LONGEST_SECONDS)
        events = [e["event"] for e in lines(workdir / "events.jsonl")[before:]]
        left = [path for path in unfinished(workdir) if path.is_dir()]
        if "done" in events:
            hit = "the end"
        elif "stop" in events:
            hit = "steps, then saved"
        elif not events:
            hit = "start-up"
        elif events == ["start"]:
            hit = "compiling"
        elif not left:
            hit = "steps"
        elif any(p.is_dir() and UNFINISHED not in p.name for p in left[0].iterdir()):
            hit = "finalising"
        else:
            hit = "saving"
        return hit, status

    def compare(self, workdir: pathlib.Path) -> None:
        """Adds to `faults` what differs from the run that was not killed."""
        want, found = saved(self.whole, self.steps), saved(workdir, self.steps)
        if want != found:
            names = sorted(n for n in want | found if want.get(n) != found.get(n))
            self.faults.append(f"{workdir.name}: {names} differ")
        whole, own = (lines(run / "metrics.jsonl") for run in (self.whole, workdir))
        rows = {row["step"]: row for row in map(numbers, whole)}
        for row in map(numbers, own):
            if row != rows[row["step"]]:
                self.faults.append(f"{workdir.name}: {row} is not {rows[row['step']]}")
        if any(unfinished(workdir)):
            self.faults.append(f"{workdir.name}: unfinished checkpoints are left")


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Folders of checkpoints that are being written, or never will be."""
    return sorted((workdir / "checkpoints").glob(f"*{UNFINISHED}*"))


def lines(path: pathlib.Path) -> list[dict]:
    """Of a file of JSON lines; one that was cut short is left out."""
    found = []
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def numbers(row: dict) -> dict:
    """A line of metrics without what depends on the clock."""
    return {n: v for n, v in row.items() if not n.endswith("_per_second")}


def saved(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Of a checkpoint every array's bytes by its name, and the data's position."""
    folder = workdir / "checkpoints" / str(step)
    found = {"position": (folder / "iterator" / "metadata").read_bytes()}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("ema", "train"):
            tree = checkpointer.restore(folder / item)
            for path, leaf in jax.tree.leaves_with_path(tree):
                array = np.asarray(leaf)
                name = f"{item}{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
                found[name] = array.tobytes()
    return found


def table(hits: collections.Counter) -> str:
    """What was hit, in Markdown."""
    rows = ["| what was hit | " + " | ".join(WAYS) + " |"]
    rows.append("|---" * (len(WAYS) + 1) + "|")
    for hit in sorted({hit for _, hit, _ in hits}):
        cells = []
        for way in WAYS:
            found = sorted(
                (status, count)
                for (by, what, status), count in hits.items()
                if (by, what) == (way, hit)
            )
            cells.append(", ".join(f"{n} (status {s})" for s, n in found))
        rows.append(f"| {hit} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Prints the table; status 1 when something differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folder", type=pathlib.Path, default=None)
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    folder = args.folder or pathlib.Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    torture = Torture(folder, steps=80, every=5, seed=seed)
    killed = runs = 0
    while killed < args.kills:
        runs += 1
        plan = [torture.draw() for _ in range(args.kills - killed)]
        killed += torture.until_done(folder / f"run{runs}", plan)
        print(f"run {runs} is done: {killed} kills", flush=True)
    print(f"{killed} kills, {runs} runs, {time.monotonic() - begun:.0f} s")
    print(table(torture.hits))
    print("\n".join(torture.faults) or "all runs are bitwise the one not killed")
    sys.exit(bool(torture.faults))


if __name__ == "__main__":
    main()
