"""Trains a two-stage text-to-image cascade on drawn shapes, and shows its pictures.

python -m imagen_jax.demo --output=demo [--seconds=400]

Prepares captioned shapes, trains a base and a super-resolution stage, samples captions
whose combinations of colour and shape were never trained on, judges the pictures, and
writes index.html, samples.png and report.json.
"""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from imagen_jax import cli, page
from imagen_jax import images as pictures
from imagen_jax.api.cascade import open_stages, sample_prompts, with_sampler
from imagen_jax.api.run import resolve, train_stage
from imagen_jax.config import MeshConfig, StageConfig
from imagen_jax.errors import UserError
from imagen_jax.prepare import prepare
from imagen_jax.sample import write
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes.judge import Verdict, judge
from imagen_jax.sharding import make_mesh

# What configs/tiny.py trains in about this time on two CPU cores.
_SECONDS = 400
_EXAMPLES = 20_000
_LEAST_EXAMPLES = 1_000
_JUDGED = 64


def _stage_config(name: str, share: float, records: pathlib.Path) -> StageConfig:
    """A stage of configs/tiny.py with its training scaled to `share`."""
    try:
        from configs import tiny
    except ModuleNotFoundError:
        raise UserError(
            "configs/tiny.py is not found: run the demo from the root of the clone"
        ) from None
    config = tiny.get_config(name)
    config.data.records = str(records)
    steps = max(10, round(config.training.steps * share))
    config.training.update(
        steps=steps, sample_every_steps=0, checkpoint_every_steps=steps
    )
    config.optimizer.decay_steps = steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
    return resolve(config.to_dict())


def _kind(scene: shapes.Scene) -> str:
    if len(scene.items) == 1:
        return "one object"
    return "two in a relation" if scene.relation else "two or three alike"


def summarise(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The number of pictures, and the share that is right in each respect."""
    names = [field.name for field in dataclasses.fields(Verdict)]
    return {"judged_pictures": len(verdicts)} | {
        f"{name}_accuracy": float(np.mean([getattr(v, name) for v in verdicts]))
        for name in names
    }


def demo(output: str, seconds: float) -> dict:
    """Runs the whole cascade in `output`; returns the report.

    Args:
      output: a folder; what an earlier demo left there is replaced.
      seconds: how long to train, about, on two CPU cores.

    Raises:
      UserError: when `output` is not empty and not a demo's.
    """
    if seconds <= 0:
        raise UserError(f"--seconds is {seconds:g}; it must be above zero")
    started = time.perf_counter()
    folder = pathlib.Path(output)
    marker = folder / "demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise UserError(f"{output} is not empty and not of a demo; give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.write_text("This folder is replaced by the next demo.\n")

    records = folder / "records"
    share = seconds / _SECONDS
    # A shorter training sees each picture as often.
    count = max(_LEAST_EXAMPLES, round(min(1.0, share) * _EXAMPLES))
    prepare(f"shapes:{count}", str(records), text_length=16, image_size=32)
    workdirs = [str(folder / name) for name in ("base", "sr")]
    for workdir, name in zip(workdirs, ("base", "sr"), strict=True):
        train_stage(_stage_config(name, share, records), workdir)

    mesh = make_mesh(MeshConfig())
    trained = open_stages(workdirs)
    scenes = list(shapes.heldout(_JUDGED, seed=1))
    prompts = [shapes.caption(scene) for scene in scenes]
    seeds = np.arange(_JUDGED)
    own = [one.cfg.sampler.guidance for one in trained]
    results = {}
    for label, weights in (("guidance off", [1.0]), ("guidance on", own)):
        made, _ = sample_prompts(
            with_sampler(trained, guidance=weights), prompts, seeds, mesh
        )
        verdicts = [judge(p, c) for p, c in zip(made[-1], prompts, strict=True)]
        results[label] = summarise(verdicts)
    overall = results["guidance on"]
    for kind in dict.fromkeys(map(_kind, scenes)):
        of_kind = [
            v for v, scene in zip(verdicts, scenes, strict=True) if _kind(scene) == kind
        ]
        results[f"of these, {kind}"] = summarise(of_kind)

    write(str(folder / "samples"), trained, prompts, seeds, made)
    pictures.save(
        folder / "samples.png",
        pictures.grid(pictures.enlarge(made[-1], 96), 8, prompts),
    )
    report = {
        "seconds": time.perf_counter() - started,
        "peak_memory_gib": cli.peak_memory_gib(),
        **overall,
        "accuracy": results,
        "guidance": dict(zip(("base", "sr"), own, strict=True)),
        "training_steps": {t.cfg.name: t.step for t in trained},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    curves = {
        t.cfg.name: page.read_curve(pathlib.Path(t.workdir) / "metrics.jsonl")
        for t in trained
    }
    (folder / "index.html").write_text(
        page.render(report, prompts, verdicts, curves), "utf8"
    )
    return report


def table(report: dict) -> str:
    """The report's accuracies as lines of text."""
    names = [field.name for field in dataclasses.fields(Verdict)]
    head = ("pictures", *names)
    lines = ["held-out captions".ljust(30) + "".join(n.rjust(10) for n in head)]
    for label, row in report["accuracy"].items():
        cells = (f"{row[f'{name}_accuracy']:.0%}".rjust(10) for name in names)
        count = str(row["judged_pictures"]).rjust(10)
        lines.append(label.ljust(30) + count + "".join(cells))
    return "\n".join(lines)


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("output", None, "folder for everything that it makes")
    flags.DEFINE_float("seconds", _SECONDS, "of training, about, on two CPU cores")
    flags.mark_flags_as_required(["output"])


def main() -> None:
    """Runs the demo and says where to look."""
    report = demo(flags.FLAGS.output, flags.FLAGS.seconds)
    print(f"\n{table(report)}\n")
    print(
        f"{report['seconds']:.0f} seconds, at most {report['peak_memory_gib']:.1f} GiB "
        f"of memory, {report['judged_pictures']} pictures judged"
    )
    print(f"open {pathlib.Path(flags.FLAGS.output).resolve() / 'index.html'}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
