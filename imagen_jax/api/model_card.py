"""README.md of what `export` writes: a model card in the format of Hugging Face."""

import dataclasses
import html
import json
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax import __version__
from imagen_jax.errors import UserError
from imagen_jax.models.t5 import SIZES
from imagen_jax.training.weights import Weights


@dataclasses.dataclass(frozen=True)
class Told:
    """What a card says that no config knows."""

    license: str = ""  # an identifier of Hugging Face, as "apache-2.0"
    data: Sequence[Mapping[str, Any]] = ()  # figures of each set of records, by name
    evaluations: Sequence[str] = ()  # lines that `evaluate` printed
    samples: Sequence[Mapping[str, Any]] = ()  # "file", "prompt" and "seed" of each

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9.-]*", self.license):
            raise UserError(f"{self.license!r} is no license: as Hugging Face names it")


def stage_card(stage: Weights, count: int, dtype: str, folder: str, told: Told) -> str:
    """The card of one stage of `count` parameters; `folder` is but a name."""
    cfg, text = stage.cfg, stage.cfg.text
    makes = f"images of {cfg.image_size} x {cfg.image_size} pixels from a caption"
    if cfg.lowres_size:
        makes += (
            f" and an image of {cfg.lowres_size} x {cfg.lowres_size} (`--lowres=IMAGE`,"
            " or `--stage` of the stages before it first)"
        )
    return _filled(
        "stage_card.md",
        told,
        name=cfg.name,
        size=cfg.image_size,
        makes=makes,
        architecture=cfg.model.architecture,
        count=f"{count:,}",
        dtype=dtype,
        trained=_trained(stage),
        predicts=_predicts(stage),
        encoder=text.encoder,
        length=text.length,
        dim=text.dim,
        folder=folder,
    )


def cascade_card(
    stages: Sequence[Weights],
    folders: Sequence[str],
    counts: Sequence[int],
    dtype: str,
    told: Told,
) -> str:
    """The card of a cascade: base first, with each stage's folder and parameters."""
    text = stages[0].cfg.text
    prompt = told.samples[0]["prompt"] if told.samples else "a red circle"
    return _filled(
        "cascade_card.md",
        told,
        size=stages[-1].cfg.image_size,
        number=len(stages),
        pictures=_pictures(told.samples),
        rows="\n".join(map(_row, stages, folders, counts)),
        dtype=dtype,
        prompt=json.dumps(prompt, ensure_ascii=False),
        folder=folders[0],
        encoder=text.encoder,
        where=_where(text.encoder),
        length=text.length,
        data="".join(map(_data, told.data)),
        evaluations=_section("Evaluation", [f"- {one}" for one in told.evaluations]),
    )


def gaps(told: Told) -> list[str]:
    """What is left for a publisher to add, an item a line."""
    license = (
        "**License: none is stated.** Until one is, nobody is allowed to use these "
        "weights."
    )
    data = "What it was trained on, and what follows from that for its use."
    items = {license: told.license, data: told.data}
    items |= {"What it was evaluated on.": told.evaluations}
    return [f"- {text}" for text, is_told in items.items() if not is_told]


def _filled(file: str, told: Told, **values: Any) -> str:
    """The template in a file of this folder with its values."""
    template = string.Template(pathlib.Path(__file__).with_name(file).read_text("utf8"))
    left = _section("What its publisher has to add", gaps(told))
    own = {"head": _head(told), "gaps": left, "version": __version__}
    return template.substitute(values | own).rstrip("\n") + "\n"


def _head(told: Told) -> str:
    """The lines of YAML that Hugging Face reads."""
    lines = ["---", "library_name: imagen-jax", "pipeline_tag: text-to-image"]
    lines.append(f"license: {told.license or 'other'}")
    lines += [] if told.license else ["license_name: not-stated"]
    lines += ["widget:"] if told.samples else []
    for one in told.samples:
        # A string of JSON is one of YAML.
        text = json.dumps(one["prompt"])
        lines.append(f"- text: {text}\n  output:\n    url: {one['file']}")
    return "\n".join([*lines, "---"])


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n## {}\n\n{}\n".format(title, "\n".join(lines)) if lines else ""


def _trained(stage: Weights) -> str:
    return f"{stage.step:,} steps of {stage.cfg.training.batch_size} images"


def _predicts(stage: Weights) -> str:
    diffusion = stage.cfg.diffusion
    return f"{diffusion.prediction}, {diffusion.schedule} schedule"


def _row(stage: Weights, folder: str, count: int) -> str:
    size, low, sampler = stage.cfg.image_size, stage.cfg.lowres_size, stage.cfg.sampler
    cells = [
        f"`{folder}`",
        f"{size} x {size} pixels from " + (f"{low} x {low}" if low else "a caption"),
        stage.cfg.model.architecture,
        f"{count:,}",
        _trained(stage),
        _predicts(stage),
        f"{sampler.name}, {sampler.steps} steps, guidance {sampler.guidance:g}",
    ]
    return "| {} |".format(" | ".join(cells))


def _where(identity: str) -> str:
    """Where the encoder of an identity is found."""
    name = identity.partition("@")[0]
    if name == "tiny":
        return "It is part of imagen-jax."
    found = "a model of transformers"
    if name in SIZES:
        version, _, size = name.removeprefix("t5_1_").partition("_")
        page = f"google/t5-v1_1-{size}" if version == "1" else f"google-t5/t5-{size}"
        found = f"[{page}](https://huggingface.co/{page}) or a finetune of it"
    return (
        f"It is no part of this folder, but {found}: give its folder as "
        "`encoder_weights`. A hash of its numbers ends its name; others are refused."
    )


def _pictures(samples: Sequence[Mapping[str, Any]]) -> str:
    """Rows of four pictures with their captions, in HTML."""
    cells = []
    for one in samples:
        text = html.escape(one["prompt"])
        image = f'<img src="{one["file"]}" alt="{text}" width="160">'
        cells.append(f"<td>{image}<br>{text}</td>")
    rows = ["".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    table = "\n".join(["<table>", *(f"<tr>{row}</tr>" for row in rows), "</table>"])
    told = "Made by these weights with the seeds in `samples.jsonl`; none was left out."
    return f"\n{table}\n\n{told}\n" if rows else ""


def _data(figures: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    return _section("Training data", ["| | |", "|---|---|", *rows])
