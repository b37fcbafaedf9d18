"""A tiny training, killed at random times and resumed, compared bit by bit.

JAX_PLATFORMS=cpu python -m benchmarks.torture [--kills=100] [--seed=0] [--folder=DIR]

One run is left alone. Others are killed and started again until they are done: by
SIGKILL, SIGTERM, Ctrl-C and a second Ctrl-C, while they start, take steps, save,
finalise a checkpoint and end. Each must end with the arrays of the first in its last
checkpoint, the same position of the data, previews, and metrics.jsonl but for fields of
time. Prints a table of what was hit; exit status 1 when something differs.
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
# The smallest network: a process mostly starts Python and traces.
STAGE = {
    "model.channels": "(8,)",
    "model.num_res_blocks": "(1,)",
    "model.self_attention": "(False,)",
    "model.text_attention": "(False,)",
    "model.text_conditioning": "mean_pool",
    "text.length": 4,
    "training.batch_size": 4,
    # No two of the intervals divide each other.
    "training.log_every_steps": 3,
    "training.sample_every_steps": 14,
    "training.preview_images": 2,
    "sampler.steps": 2,
    "sampler.batch_size": 2,
}
# Ways to end a process, and how often each is drawn.
WAYS = ("kill", "term", "int", "int twice")
WEIGHTS = (5, 2, 2, 1)
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
# Exit statuses that each way may have: done, saved, or killed.
STATUSES = {
    "kill": (0, -9),
    "term": (0, 3, -15),
    "int": (0, 3, -2),
    "int twice": (0, 3, -2, 130),
}
# Moments to end it: while it starts, some time after its first checkpoint, while a
# checkpoint is being written, and once the last one is begun.
WHEN = ("start", "steps", "steps", "saving", "saving", "end")
LONGEST_SECONDS = 600


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Environment of a process on one CPU device that compiles without optimising."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Torture:
    """Runs of one training in a folder.

    Attributes:
      hits: number of each (way, what was hit, exit status).
      faults: a line per thing that went wrong.
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
        """A process of the run; its output is appended to `workdir`.log."""
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
        """The output of all processes of a run."""
        return pathlib.Path(f"{workdir}.log").read_text()

    def draw(self) -> tuple[str, str]:
        """A random way to end a process, and a moment."""
        return self.random.choices(WAYS, WEIGHTS)[0], self.random.choice(WHEN)

    def until_done(self, workdir: pathlib.Path, plan: list[tuple[str, str]]) -> int:
        """Kills a run as planned and lets it finish; returns the number of kills.

        Args:
          workdir: folder of a new run.
          plan: way and moment for each process; the one after them is left alone.
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
            # Interrupted imports print Python's own traceback.
            if "Traceback" in told and hit != "start-up":
                self.faults.append(f"{workdir.name}: {told[-2000:]}")
            if status == 0:
                self.compare(workdir)
                return killed

    def wait_for_a_moment(self, workdir, process, when: str, before: int) -> bool:
        """Waits for a random time at the moment `when`; False if the process ended."""
        if when == "start":
            # Compiled programs are in the cache by now.
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
        # Short of the end, or most processes would finish the run.
        steps = self.training_seconds / 4
        longest = {"steps": steps, "saving": 0.3, "end": 1.0}[when]
        time.sleep(self.random.uniform(0, longest))
        return process.poll() is None

    def kill(self, workdir, process, way: str, before: int) -> tuple[str, int]:
        """Sends the signal; returns what was hit, and the exit status."""
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
        rows, own = (metrics(run / "metrics.jsonl") for run in (self.whole, workdir))
        if rows != own:
            wrong = [row for row in own if row not in rows]
            steps = [row["step"] for row in own]
            self.faults.append(f"{workdir.name}: logs differ: {steps}, {wrong}")
        if previews(self.whole) != previews(workdir):
            self.faults.append(f"{workdir.name}: previews differ")
        if any(unfinished(workdir)):
            self.faults.append(f"{workdir.name}: unfinished checkpoints are left")


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Folders of checkpoints that are not finished."""
    return sorted((workdir / "checkpoints").glob(f"*{UNFINISHED}*"))


def lines(path: pathlib.Path) -> list[dict]:
    """The values of a file of JSON lines, without one that was cut short."""
    found = []
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def metrics(path: pathlib.Path) -> list[dict]:
    """All lines of a metrics.jsonl, without what depends on the clock."""
    rows = map(json.loads, path.read_text().splitlines())
    return [
        {n: v for n, v in row.items() if not n.endswith("_per_second")} for row in rows
    ]


def previews(workdir: pathlib.Path) -> dict[str, bytes]:
    """The files of samples/ by name."""
    return {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}


def saved(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Bytes of every array of a checkpoint by name, and of the data's position."""
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
    """A Markdown table of the hits."""
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
    """Tortures until `--kills` kills are done."""
    parser = argparse.ArgumentParser(description=__doc__)
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
