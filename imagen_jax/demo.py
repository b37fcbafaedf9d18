"""Trains a two-stage text-to-image cascade on drawn shapes, and shows its pictures.

python -m imagen_jax.demo --output=demo [--seconds=400] [--encoder=FOLDER]

Prepares captioned shapes, trains a base and a super-resolution stage, samples captions
whose combinations of colour and shape were never trained on, judges the pictures, and
writes index.html (one file), samples.png and report.json. With the folder of a
pretrained text encoder captions have hundreds of words (shapes/words.txt), and what is
sampled is said in wordings and in words that were never trained on.
"""

import base64
import dataclasses
import html
import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from imagen_jax import cli, images
from imagen_jax.api.cascade import all_cells
from imagen_jax.api.library import load_cascade
from imagen_jax.api.run import resolve, train_stage
from imagen_jax.api.samples import Job, make
from imagen_jax.config import StageConfig
from imagen_jax.configs import tiny
from imagen_jax.errors import UserError, printable
from imagen_jax.prepare import prepare
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes import wordings
from imagen_jax.shapes.judge import Verdict, judge
from imagen_jax.stores import check_disk
from imagen_jax.training.metrics import METRICS
from imagen_jax.training.page import curve

# Training configs/tiny.py takes about this long on two CPU cores.
_SECONDS = 400
_LEAST_EXAMPLES = 1_000
_JUDGED = 64
# Examples, and tokens of a caption. A small pretrained encoder embeds a hundred
# captions a second, and few of many words are equal.
_SOURCES = {"shapes": (20_000, 16), "wordings": (8_000, 32)}
_STAGES = ("base", "sr")
_ASPECTS = [field.name for field in dataclasses.fields(Verdict)]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1200px; margin: auto; padding: 1em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: 2px 10px; text-align: right; } tr > :first-child { text-align: left; }
.pictures { display: grid; gap: 24px; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
figure { margin: 0; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
img { width: 100%; image-rendering: pixelated; outline: 1px solid #ddd; }
.row div { font-size: 12px; line-height: 1.3; } .wrong { color: #b00020; }
svg { background: #fafafa; max-width: 100%; height: auto; }
@media (max-width: 600px) { td, th { padding: 2px 4px; font-size: 12px; } }
"""


def _stage_config(name: str, scale: float, records: pathlib.Path) -> StageConfig:
    """A stage of configs/tiny.py with `scale` times its training steps."""
    config = tiny.get_config(name)
    config.data.records = str(records)
    config.text.update(length=0, dim=0)  # the records'
    steps = max(10, round(config.training.steps * scale))
    config.training.update(
        steps=steps, sample_every_steps=0, checkpoint_every_steps=steps
    )
    config.optimizer.decay_steps = steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
    return resolve(config.to_dict())


class Asked(NamedTuple):
    """A caption to sample, and what the judge takes it for."""

    kind: str
    prompt: str
    scene: shapes.Scene

    @property
    def plain(self) -> str:
        """The caption in the words of scenes.py."""
        return shapes.caption(self.scene)


def asked(in_other_words: bool) -> list[Asked]:
    """New pairs of colour and shape; or trained ones in new wordings and new words."""
    if not in_other_words:
        scenes = shapes.heldout(_JUDGED, seed=1)
        return [Asked(_kind(scene), shapes.caption(scene), scene) for scene in scenes]
    disc = shapes.Scene((shapes.Item("circle", "red", "", 0.5, 0.5, 0.3),))
    found = [Asked("new words", "a crimson disc", disc)]
    for i, scene in enumerate(shapes.generate(_JUDGED - 1, seed=1)):
        kind = ("wordings", "words")[i % 2]
        prompt = wordings.say(scene, kind, np.random.default_rng((1, i)))
        found.append(Asked(f"new {kind}", prompt, scene))
    return found


def _kind(scene: shapes.Scene) -> str:
    if len(scene.items) == 1:
        return "one object"
    return "two in a relation" if scene.relation else "two or three alike"


def summarise(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """The number of pictures, and the share that is right in each aspect.

    It is of the pictures whose captions ask for it; None where none does.
    """
    summary = {"judged_pictures": len(verdicts)}
    for name in _ASPECTS:
        asked = [v for v in (getattr(one, name) for one in verdicts) if v is not None]
        summary[f"{name}_accuracy"] = float(np.mean(asked)) if asked else None
    return summary


def demo(output: str, seconds: float, encoder: str = "") -> dict[str, Any]:
    """Trains, samples and judges the whole cascade in `output`; returns the report.

    It trains for about `seconds` on two CPU cores; with an `encoder`, a folder for
    transformers or a name that `prepare` knows, on captions in many words. Raises
    `UserError` for an `output` that is neither empty nor an earlier demo's, which is
    replaced.
    """
    if seconds <= 0:
        raise UserError(f"--seconds is {seconds:g}; it must be above zero")
    check_disk(output)
    started = time.perf_counter()
    folder = pathlib.Path(output)
    marker = folder / "demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise UserError(f"{output} is not empty and not of a demo; give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.write_text("This folder is replaced by the next demo.\n")

    records = folder / "records.npz"  # in memory: no TensorFlow to start
    scale = seconds / _SECONDS
    source, new = "shapes", "combinations of colour and shape"
    if encoder:
        source, new = "wordings", "wordings or words"
    # A shorter training sees each picture as often.
    examples, text_length = _SOURCES[source]
    count = max(_LEAST_EXAMPLES, round(min(1.0, scale) * examples))
    weights = encoder if os.path.isdir(encoder) else ""
    prepare(
        f"{source}:{count}",
        str(records),
        encoder=f"hf:{weights}" if weights else encoder or "tiny",
        text_length=text_length,
        image_size=32,
    )
    for name in _STAGES:
        train_stage(_stage_config(name, scale, records), str(folder / name))

    workdirs = [str(folder / name) for name in _STAGES]
    cascade = load_cascade(*workdirs, encoder_weights=weights)
    all_asked = asked(bool(encoder))
    prompts = [one.prompt for one in all_asked]
    guidance = [cfg.sampler.guidance for cfg in cascade.config]
    unguided = all_cells(cascade.config, [(1.0,)])
    ways = {"guidance off": ("unguided", unguided), "guidance on": ("samples", ())}
    accuracy, made, verdicts = {}, {}, {}
    for label, (name, cells) in ways.items():
        job = Job(str(folder / name), cascade.trained, prompts, cells=cells)
        make(job, cascade)
        made[label] = job.read()
        pairs = zip(made[label], all_asked, strict=True)
        verdicts[label] = [judge(picture, one.plain) for picture, one in pairs]
        accuracy[label] = summarise(verdicts[label])
    for kind in dict.fromkeys(one.kind for one in all_asked):
        pairs = zip(verdicts[label], all_asked, strict=True)
        same = [verdict for verdict, one in pairs if one.kind == kind]
        accuracy[f"of these, {kind}"] = summarise(same)

    images.save_sheet(folder / "samples.png", made[label], 8, prompts)
    report = {
        "seconds": time.perf_counter() - started,
        "peak_memory_gib": cli.peak_memory_gib(),
        **accuracy["guidance on"],
        "accuracy": accuracy,
        "guidance": dict(zip(_STAGES, guidance, strict=True)),
        "encoder": cascade.config[0].text.encoder,
        "never_trained_on": new,
        "training_steps": {t.cfg.name: t.step for t in cascade.trained},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    curves = {name: read_curve(folder / name / METRICS) for name in _STAGES}
    size = made[label].shape[1]
    drawn = np.stack([shapes.draw(one.scene, size) for one in all_asked])
    shown = {"drawn": drawn, "base": job.read(stage=0)} | made
    text = page(report, prompts, shown, verdicts, curves)
    (folder / "index.html").write_text(text, "utf8")
    return report


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The report's accuracies, the head first; "-" where nothing is asked."""
    found = [["held-out captions", "pictures", *_ASPECTS]]
    for label, row in report["accuracy"].items():
        shares = [row[f"{name}_accuracy"] for name in _ASPECTS]
        cells = ["-" if share is None else f"{share:.0%}" for share in shares]
        found.append([label, str(row["judged_pictures"]), *cells])
    return found


def table(report: Mapping[str, Any]) -> str:
    """The report's accuracies as lines of text."""
    return "\n".join(
        f"{label:30}" + "".join(f"{cell:>10}" for cell in cells)
        for label, *cells in _rows(report)
    )


def page(
    report: Mapping[str, Any],
    prompts: Sequence[str],
    pictures: Mapping[str, np.ndarray],
    verdicts: Mapping[str, Sequence[Verdict]],
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> str:
    """The demo's HTML page: one file, its pictures inside.

    `report` is what `demo` returns. `pictures` are `[N, H, W, 3]` uint8 by what they
    are, and `verdicts` the judge's on some of them, for N prompts. `curves` are the
    points `(step, loss)` of each stage.
    """
    steps = ", ".join(f"{k} {v} steps" for k, v in report["training_steps"].items())
    guidance = ", ".join(f"{w:g} for {k}" for k, w in report["guidance"].items())
    head, *lines = (
        "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        for row in _rows(report)
    )
    figures = ""
    for i, prompt in enumerate(prompts):
        judged = {label: each[i] for label, each in verdicts.items()}
        tiles = (_tile(k, each[i], judged.get(k)) for k, each in pictures.items())
        row = f'<div class="row">{"".join(tiles)}</div>'
        figures += f"<figure>{html.escape(prompt)}{row}</figure>\n"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>imagen-jax demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style>
<h1>imagen-jax demo</h1>
<p>A base stage (text to 16 pixels) and a super-resolution stage (16 to 32 pixels),
trained just now ({steps}) on drawn scenes and sampled with captions whose
{report["never_trained_on"]} were never trained on. Text encoder:
{html.escape(report["encoder"])}. {report["seconds"]:.0f} seconds in all, at most
{report["peak_memory_gib"]:.1f} GiB of memory.</p>
<h2>Judged by a program that looks only at the picture and the caption</h2>
<div class="scroll"><table><tr>{head.replace("td>", "th>")}</tr>
{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>
<p>Shares are of the captions that ask for it.</p>
<h2>Pictures</h2>
<p>Of each caption: a scene drawn by code, the base stage's picture (with guidance), and
the cascade's without and with guidance (w = {guidance}). What the judge finds wrong is
in red.</p>
<div class="pictures">
{figures}</div>
<h2>Loss</h2>
{"".join(curve(name, points) for name, points in curves.items())}</html>
"""


def _tile(label: str, picture: np.ndarray, verdict: Verdict | None) -> str:
    """A picture with its label, and what the judge finds wrong."""
    data = base64.b64encode(images.png(picture)).decode()
    found = dataclasses.asdict(verdict) if verdict else {}
    wrong = ", ".join(name for name, met in found.items() if met is False)
    return (
        f'<div><img alt="" src="data:image/png;base64,{data}">{label}'
        f'<div class="wrong">{wrong}</div></div>\n'
    )


def read_curve(path: pathlib.Path) -> list[tuple[int, float]]:
    """`(step, loss)` of every line of a metrics.jsonl."""
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("output", None, "folder for everything the demo writes")
    flags.DEFINE_float("seconds", _SECONDS, "training time on two CPU cores, about")
    flags.DEFINE_string(
        "encoder",
        "",
        "folder of a text encoder for transformers: captions in many words",
    )
    flags.mark_flags_as_required(["output"])


def main() -> None:
    """Runs the demo and says where to look."""
    report = demo(flags.FLAGS.output, flags.FLAGS.seconds, flags.FLAGS.encoder)
    page = printable(pathlib.Path(flags.FLAGS.output).resolve() / "index.html")
    print(
        f"\n{table(report)}\n\n"
        f"{report['seconds']:.0f} seconds, at most {report['peak_memory_gib']:.1f} GiB "
        f"of memory\nopen {page}"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
