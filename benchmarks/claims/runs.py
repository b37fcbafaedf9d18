"""Trainings, samples and their scores in a folder, each made once.

It holds worlds/ (pictures), encoders/, records/, trainings/NAME-sSEED/ (workdirs) with
a NAME-sSEED.json beside each that is done, samples/ and results/ARM-sSEED.json. What is
there is not made again, and what was stopped goes on.
"""

import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import encoders
from benchmarks.claims.claims import Arm, Training
from benchmarks.claims.worlds import Asked, World
from imagen_jax import images
from imagen_jax.config import from_json
from imagen_jax.errors import UserError
from imagen_jax.files import write_text
from imagen_jax.planning.program import forward_flops

ROOT = pathlib.Path(__file__).parents[2]
# Points of a curve of the loss; its last tenth is the loss of a training.
_POINTS = 30


def call(command: Sequence[str]) -> None:
    """Runs a command of imagen_jax from the root of the clone; `UserError` if it fails.

    What it prints is shown.
    """
    print("$", " ".join(command[1:]), flush=True)
    places = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(command, cwd=ROOT, env=env)
    if done.returncode:
        raise UserError(f"stopped with status {done.returncode}: {' '.join(command)}")


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where things are made, and of what."""

    root: pathlib.Path
    pretrained: str = ""  # folder of a BERT; "" for the package's
    emoji: str = ""  # folder of captioned emoji
    run: Callable[[list[str]], None] = call

    def pictures(self, world: World) -> pathlib.Path:
        """The folder of a world's pictures, if it has one; written if need be."""
        if world.name == "emoji":
            return pathlib.Path(self.emoji)
        folder = self.root / "worlds" / world.name
        # The table is written last.
        if world.write and not (folder / "metadata.jsonl").exists():
            world.write(folder)
        return folder

    def encoder(self, name: str) -> str:
        """The folder of an encoder; "" for the tiny one, which has none."""
        if name == "tiny":
            return ""
        folder = self.root / "encoders"
        pretrained = encoders.find_pretrained(self.pretrained, folder)
        return str(encoders.write(name, pretrained, folder))

    def records_file(self, training: Training) -> pathlib.Path:
        """Where they are or will be."""
        name = f"{training.world.name}-{training.encoder}.npz"
        return self.root / "records" / name

    def records(self, training: Training) -> pathlib.Path:
        """The records that a training reads; prepared if need be."""
        world, path = training.world, self.records_file(training)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            source, folder = world.source, self.pictures(world)
            encoder = self.encoder(training.encoder)
            self.run(
                [
                    *door("prepare"),
                    f"--source={source}{folder if source == 'folder:' else ''}",
                    f"--output={path}",
                    f"--encoder=hf:{encoder}" if encoder else "--encoder=tiny",
                    f"--text_length={world.text_length}",
                    f"--image_size={world.image_size}",
                ]
            )
        return path

    def workdir(self, training: Training, seed: int) -> pathlib.Path:
        """That of one training."""
        return self.root / "trainings" / f"{training.name}-s{seed}"

    def figures(self, training: Training, seed: int) -> pathlib.Path:
        """The file that says that a training is done, and its `figures`."""
        workdir = self.workdir(training, seed)
        return workdir.with_name(f"{workdir.name}.json")

    def train(self, training: Training, seed: int) -> dict[str, Any]:
        """Trains a stage, if need be; what is known of it (`figures`)."""
        workdir, done = self.workdir(training, seed), self.figures(training, seed)
        if not done.exists():
            places = f"--workdir={workdir}", self.records(training)
            command = train_command(training, seed, *places)
            self.run(command)
            told = figures(workdir) | {"command": command[1:]}
            write_text(done, json.dumps(told) + "\n")
        return json.loads(done.read_text())

    def sample(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Samples and judges an arm, if need be.

        Returns:
          "kinds", that of each caption, and "scores": by measure a value of each
          caption, or one of all; also those of the last stage's training.
        """
        name = f"{slug(arm)}-s{seed}"
        result = self.root / "results" / f"{name}.json"
        if not result.exists():
            trained = [self.train(stage, seed) for stage in arm.stages]
            world, folder = arm.asks, self.root / "samples" / name
            asked, scores, command = world.ask(self.pictures(world)), {}, []
            if asked:
                command = self._sample_command(arm, seed, asked, folder)
                self.run(command)
                files = [folder / f"{i:04d}.png" for i in range(len(asked))]
                made = np.stack([images.read(file) for file in files])
                scores = world.judge(made, asked, self.pictures(world))
            scores |= {k: [trained[-1][k]] for k in ("loss", "step_seconds", "gflop")}
            result.parent.mkdir(parents=True, exist_ok=True)
            found = {
                "command": command[1:],
                "kinds": [one.kind for one in asked],
                "scores": scores,
            }
            write_text(result, json.dumps(found) + "\n")
        return json.loads(result.read_text())

    def is_sampled(self, arm: Arm, seed: int) -> bool:
        """Whether the results of an arm are there."""
        return (self.root / "results" / f"{slug(arm)}-s{seed}.json").exists()

    def _sample_command(
        self, arm: Arm, seed: int, asked: Sequence[Asked], folder: pathlib.Path
    ) -> list[str]:
        world, encoder = arm.asks, self.encoder(arm.stages[-1].encoder)
        prompts, starts = self.root / "prompts" / f"{world.name}.txt", []
        prompts.parent.mkdir(parents=True, exist_ok=True)
        write_text(prompts, "".join(f"{one.text}\n" for one in asked))
        for number, picture in enumerate(world.start(asked) if world.start else ()):
            starts.append(prompts.parent / f"{world.name}-{number:04d}.png")
            starts[-1].write_bytes(images.png(picture))
        return [
            *door("sample"),
            *(f"--stage={self.workdir(stage, seed)}" for stage in arm.stages),
            f"--prompts={prompts}",
            f"--output={folder}",
            *(f"--lowres={start}" for start in starts),
            *arm.flags,
            *([f"--encoder_weights={encoder}"] if encoder else []),
        ]


def door(name: str) -> list[str]:
    """The words that call a command."""
    return [sys.executable, "-m", f"imagen_jax.{name}"]


def train_command(
    training: Training, seed: int, workdir: str, records: pathlib.Path
) -> list[str]:
    """Trains a stage; run again, it resumes. Seeds are those of noise and of order."""
    values = {
        "data.records": records,
        "data.seed": seed,
        "training.seed": seed,
        "training.steps": training.steps,
        "training.sample_every_steps": 0,
        "training.checkpoint_every_steps": 1000,
        "training.keep_checkpoints": 1,
        "text.length": 0,
        "text.dim": 0,
        **dict(training.changes),
    }
    return [
        *door("train"),
        f"--config={training.config}",
        workdir,
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def slug(arm: Arm) -> str:
    """A name for files: equal for equal stages and flags, whatever the claim."""
    text = "+".join([stage.name for stage in arm.stages]) + "".join(arm.flags)
    return re.sub(r"[^\w.+-]+", "_", text.replace("--", "_"))


def figures(workdir: pathlib.Path) -> dict[str, Any]:
    """What is known of a training that is done.

    "loss", the mean of the last tenth; "step_seconds", the median; "gflop" of the
    forward pass of an example; "curve", points (step, mean loss).
    """
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    cfg = from_json(json.loads((workdir / "config.json").read_text()), "config.json")
    parts = np.array_split(np.arange(len(rows)), min(_POINTS, len(rows)))
    curve = [
        (rows[part[-1]]["step"], float(np.mean([rows[i]["loss"] for i in part])))
        for part in parts
    ]
    rates = [row["steps_per_second"] for row in rows if row.get("steps_per_second")]
    last = rows[-max(1, len(rows) // 10) :]
    return {
        "loss": float(np.mean([row["loss"] for row in last])),
        "step_seconds": 1 / statistics.median(rates) if rates else None,
        "gflop": forward_flops(cfg) / 1e9,
        "curve": curve,
    }


def values(
    results: Mapping[str, Sequence[Mapping[str, Any]]], measure: str, kind: str
) -> dict[str, np.ndarray]:
    """The figures `[S, N]` of a measure by arm, of those arms that have it.

    `results` are those of `Lab.sample` by arm, one for each seed.
    """
    found = {}
    for label, own in results.items():
        if all(measure in one["scores"] for one in own):
            rows = np.array([one["scores"][measure] for one in own], float)
            kinds = np.array(own[0]["kinds"])
            if kind and rows.shape[1] == len(kinds):
                rows = rows[:, kinds == kind]
            if rows.size and np.isfinite(rows).any():
                found[label] = rows
    return found
