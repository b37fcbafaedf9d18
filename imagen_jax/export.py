"""Exports trained weights, to be published, given away or sampled elsewhere.

python -m imagen_jax.export --stage=WORKDIR --output=FOLDER
python -m imagen_jax.export --stage=BASE --stage=SR --output=FOLDER \
    --prompt="a red circle" --prompt="two blue squares" [--samples=8 --dtype=bfloat16]

Of one stage: the averaged parameters in model.safetensors (several files and an index
when it is large, named as Hugging Face does), config.json and README.md, a model card
with gaps for its publisher. Of a cascade: such a folder of each stage, cascade.json,
samples of what was exported with samples.jsonl, and one model card.
`sample --stage=FOLDER` and `export --stage=FOLDER` read the folder, and
`train --config.training.init_from=FOLDER` that of a stage.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import traverse_util

from imagen_jax import cli, images
from imagen_jax.api.cascade import (
    CASCADE,
    CASCADE_VERSION,
    load,
    open_stages,
    read_cascade,
)
from imagen_jax.api.library import load_cascade
from imagen_jax.api.model_card import Told, cascade_card, gaps, stage_card
from imagen_jax.config import MeshConfig
from imagen_jax.data.pipeline import read_sources
from imagen_jax.diffusion.cascade import check_order
from imagen_jax.errors import UserError, printable
from imagen_jax.evaluation import report
from imagen_jax.evaluation.tradeoff import read_results
from imagen_jax.files import appearing, open_tensors, read_rows
from imagen_jax.preparing.card import read_card
from imagen_jax.sample import read_prompts
from imagen_jax.sharding import make_mesh
from imagen_jax.stores import check_disk
from imagen_jax.training.checkpoint import description
from imagen_jax.training.metrics import EVALUATIONS
from imagen_jax.training.weights import CONFIG, INDEX, SINGLE, Weights

_CARD, _LINES = "README.md", "samples.jsonl"
_SAMPLE = r"samples/\d{4,}\.png"
# Of what a card tells that is in `CASCADE`, for the next export.
_KEPT = ("license", "data", "evaluations")
_COUNTS = ("equal_files", "equal_captions", "near_pictures")  # of a data card


def export(
    workdir: str, output: str, shard_bytes: int, dtype: str = "", license: str = ""
) -> list[str]:
    """Writes the newest undamaged average of `workdir`: everything or nothing.

    The config is stored without the paths of its records and first weights. A file has
    at most `shard_bytes` of parameters, if it holds several; `dtype` is "float32",
    "bfloat16" or "", which is as they are stored. `license` is for the card.
    Returns the names of the files that hold parameters; raises `UserError` for a
    workdir without checkpoints, or an output that is in use or cannot be written.
    """
    name = pathlib.Path(output).resolve().name
    with _new_folder(output) as folder:
        (stage,) = open_stages([workdir])
        dtype = dtype or _stored_type(stage)
        files, count = _write_stage(stage, folder, shard_bytes, dtype)
        card = stage_card(stage, count, dtype, name, Told(license))
        (folder / _CARD).write_text(card)
    return files


def export_cascade(
    workdirs: Sequence[str],
    output: str,
    shard_bytes: int,
    dtype: str = "",
    told: Told | None = None,
    prompts: Sequence[str] = (),
    samples: int = 8,
    encoder_weights: str = "",
) -> tuple[list[str], Told]:
    """Writes the stages of `workdirs`, base first, as one cascade: all or nothing.

    Its card has `told`, and what is known of records and evaluations. `samples` are
    pictures of the prompts by turns, made by what was written. Without prompts those of
    an exported cascade are kept, or the training's own prompts are taken.
    Otherwise as `export`; returns all that the card tells, too.
    """
    with _new_folder(output) as folder:
        stages = open_stages(workdirs)
        check_order([stage.cfg for stage in stages])
        types = [*map(_stored_type, stages)]
        dtype = dtype or ("float32" if "float32" in types else types[0])
        told = _with_known(told or Told(), workdirs, stages)
        keeps = len(workdirs) == 1 and {*types} == {dtype} and not prompts
        prompts = prompts or stages[0].cfg.training.preview_prompts
        asked = [] if keeps else [*itertools.islice(itertools.cycle(prompts), samples)]
        if asked and not encoder_weights and stages[0].cfg.text.encoder[:3] == "t5_":
            raise UserError("samples need the text encoder: give --encoder_weights")
        names, files, counts = [], [], []
        for stage in stages:
            names.append(f"{stage.cfg.image_size}px")
            (folder / names[-1]).mkdir()
            own, count = _write_stage(stage, folder / names[-1], shard_bytes, dtype)
            files += [f"{names[-1]}/{file}" for file in own]
            counts.append(count)
        values = {"format_version": CASCADE_VERSION, "stages": names}
        values |= {name: getattr(told, name) for name in _KEPT}
        (folder / CASCADE).write_text(json.dumps(values, indent=2) + "\n")
        if keeps:
            lines = _keep_samples(epath.Path(workdirs[0]), folder)
        else:
            lines = _make_samples(asked, folder, encoder_weights)
        if lines:
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            (folder / _LINES).write_text(text)
        told = dataclasses.replace(told, samples=lines)
        card = cascade_card(stages, names, counts, dtype, told)
        (folder / _CARD).write_text(card, "utf8")
    return files, told


@contextlib.contextmanager
def _new_folder(output: str) -> Iterator[pathlib.Path]:
    """A folder to write in, which becomes `output` in the end: all or nothing."""
    check_disk(output)
    place = pathlib.Path(output)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{output} exists and is not empty: give a new folder")
    partial = place.with_name(place.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if place.exists():
            place.rmdir()
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stored_type(stage: Weights) -> str:
    """The type of a stage's parameters on disk; checkpoints have float32."""
    for name, path in itertools.islice(stage.files.items(), 1):
        with open_tensors(path) as file:
            if file.get_slice(name).get_dtype() == "BF16":
                return "bfloat16"
    return "float32"


def _write_stage(
    stage: Weights, folder: pathlib.Path, shard_bytes: int, dtype: str
) -> tuple[list[str], int]:
    """Writes parameters and config; the names of the files, and how many parameters."""
    import safetensors.numpy

    params = load(stage, make_mesh(MeshConfig(), jax.devices("cpu")[:1])).params
    cfg = dataclasses.replace(
        stage.cfg,
        data=dataclasses.replace(stage.cfg.data, records=""),
        training=dataclasses.replace(
            stage.cfg.training, init_from="", encoder_weights=""
        ),
    )
    flat = traverse_util.flatten_dict(params, sep=".")
    kind = jnp.dtype(dtype)
    sizes = {name: x.size * kind.itemsize for name, x in flat.items()}
    shards = _shards(sizes, shard_bytes)
    for file, names in shards.items():
        arrays = {name: np.asarray(flat[name]).astype(kind) for name in names}
        with appearing(folder / file) as path:
            safetensors.numpy.save_file(arrays, path, {"format": "flax"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {n: file for file, names in shards.items() for n in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    described = description(cfg, stage.step) | {"digest": stage.digest}
    config = json.dumps(described, indent=2)
    (folder / CONFIG).write_text(config + "\n")
    return list(shards), sum(x.size for x in flat.values())


def _shards(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Names by file, in their order, cut where a file would exceed `most` bytes."""
    shards, held = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


def _with_known(told: Told, workdirs: Sequence[str], stages: Sequence[Weights]) -> Told:
    """`told` with what exported cascades, the workdirs' records and `evaluate` tell."""
    license, data, evaluations = told.license, [*told.data], [*told.evaluations]
    for own in filter(None, map(read_cascade, workdirs)):
        license = license or own["license"]
        data += own["data"]
        evaluations += own["evaluations"]
    for stage in stages:
        data += _figures(stage.cfg.data.records)
        file = epath.Path(stage.path) / EVALUATIONS
        rows = read_rows(file, "evaluations", "jsonl") if file.exists() else ()
        found = [row for _, row in rows if row.pop("step", None) == stage.step]
        evaluations += map(report.line, found)
    distinct = [one for i, one in enumerate(data) if one not in data[:i]]
    return Told(license, distinct, [*dict.fromkeys(evaluations)])


def _figures(records: str) -> list[dict[str, Any]]:
    """Figures of the data cards of records, where `prepare --report` wrote them."""
    try:
        sources = read_sources(records) if records else ()
    except UserError:  # the records are elsewhere, and their cards with them
        return []
    found = []
    for card in filter(None, (read_card(source.path) for source in sources)):
        source, pictures, captions = map(card.get, ("source", "pictures", "captions"))
        counts, scripts = card["duplicates"], captions["scripts"]["counts"].items()
        medians = [
            numbers["quantiles"].get("50 %", "unknown")
            for numbers in (pictures["shorter_side"], captions["words"])
        ]
        figures = {
            "source": source["source"].partition(":")[0],  # not its path
            "pictures": pictures["number"],
            "shorter side in pixels, median": medians[0],
            "words of a caption, median": medians[1],
            "captions by script": ", ".join(f"{name} {n:,}" for name, n in scripts),
            **{name.replace("_", " "): counts[name] for name in _COUNTS},
            "sha256 of the content": source["content_sha256"],
        }
        found.append(figures)
    return found


def _keep_samples(source: epath.Path, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Copies the samples of an exported cascade; returns the lines that name them."""
    if not (source / _LINES).exists():
        return []
    lines = []
    for number, line in read_rows(source / _LINES, "samples", "jsonl"):
        line = {name: line.get(name) for name in ("file", "prompt", "seed")}
        if [*map(type, line.values())] != [str, str, int] or (
            not re.fullmatch(_SAMPLE, line["file"])
        ):
            raise UserError(f"{source / _LINES} line {number} is of no sample")
        (folder / line["file"]).parent.mkdir(exist_ok=True)
        (folder / line["file"]).write_bytes((source / line["file"]).read_bytes())
        lines.append(line)
    return lines


def _make_samples(
    prompts: Sequence[str], folder: pathlib.Path, encoder_weights: str
) -> list[dict[str, Any]]:
    """Samples the cascade in `folder` into it; returns the lines of its pictures."""
    if not prompts:
        return []
    cascade = load_cascade(folder, encoder_weights=encoder_weights)
    lines = []
    for seed, picture in enumerate(cascade(prompts)):
        file = f"samples/{seed:04d}.png"
        (folder / file).parent.mkdir(exist_ok=True)
        images.save(folder / file, picture)
        lines.append({"file": file, "prompt": prompts[seed], "seed": seed})
    return lines


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    stage = "workdir of a training run or export, or gs://BUCKET/FOLDER; of a cascade "
    flags.DEFINE_multi_string("stage", None, stage + "once per stage, base first")
    flags.DEFINE_string("output", None, "a new folder")
    flags.DEFINE_float("shard_gb", 5.0, "most gigabytes of one file", lower_bound=0.001)
    types = ["", "float32", "bfloat16"]
    flags.DEFINE_enum("dtype", "", types, "of parameters; else as they are stored")
    license = "of the weights, as Hugging Face calls it: apache-2.0"
    flags.DEFINE_string("license", "", license)
    flags.DEFINE_multi_string("prompt", [], "of the cascade's samples, by turns")
    flags.DEFINE_integer("samples", 8, "pictures of a cascade", lower_bound=0)
    flags.DEFINE_string("encoder_weights", "", "file or folder of the text encoder")
    evaluation = "a file of `evaluate --json`, for the card of a cascade"
    flags.DEFINE_multi_string("evaluation", [], evaluation)
    flags.mark_flags_as_required(["stage", "output"])


def main() -> None:
    """Exports what the flags ask for."""
    args = flags.FLAGS
    shard_bytes = int(args.shard_gb * 1e9)
    if len(args.stage) == 1 and not read_cascade(args.stage[0]):
        (stage,) = args.stage
        if args.prompt or args.evaluation:
            raise UserError("--prompt and --evaluation: give all --stage of a cascade")
        files = export(stage, args.output, shard_bytes, args.dtype, args.license)
        told = Told(args.license)
    else:
        lines = [report.line(r) for f in args.evaluation for r in read_results(f)]
        prompts = read_prompts(args.prompt, "") if args.prompt else []
        files, told = export_cascade(
            args.stage,
            args.output,
            shard_bytes,
            args.dtype,
            Told(args.license, evaluations=lines),
            [prompt.text for prompt in prompts],
            args.samples,
            args.encoder_weights,
        )
        print(f"{len(told.samples)} samples" + ": give --prompt" * (not told.samples))
    print(f"{len(files)} files of parameters in {printable(args.output)}")
    if gaps(told):
        print(f"Fill in the gaps of its {_CARD} before publishing it")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
