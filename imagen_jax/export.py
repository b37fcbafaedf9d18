"""Exports a trained stage's averaged parameters, to be published or sampled elsewhere.

python -m imagen_jax.export --stage=WORKDIR --output=FOLDER

Writes model.safetensors (several files and an index when it is large, named as Hugging
Face does), config.json and README.md, a model card with gaps for its publisher.
`sample --stage=FOLDER` and `train --config.training.init_from=FOLDER` read the folder.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
from absl import flags
from flax import traverse_util

from imagen_jax import __version__, cli
from imagen_jax.api.cascade import load, open_stages
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError, printable
from imagen_jax.files import appearing
from imagen_jax.sharding import make_mesh
from imagen_jax.stores import check_disk
from imagen_jax.training.checkpoint import description
from imagen_jax.training.weights import CONFIG, INDEX, SINGLE, Weights

_CARD = "README.md"


def model_card(stage: Weights, count: int, folder: str) -> str:
    """Text of README.md for a stage of `count` parameters; `folder` is but a name."""
    cfg, text = stage.cfg, stage.cfg.text
    makes = f"images of {cfg.image_size} x {cfg.image_size} pixels from a caption"
    if cfg.lowres_size:
        makes += (
            f" and an image of {cfg.lowres_size} x {cfg.lowres_size} (`--lowres=IMAGE`,"
            " or `--stage` of the stages before it first)"
        )
    return f"""---
library_name: imagen-jax
pipeline_tag: text-to-image
license: other
license_name: not-stated
---

# {cfg.name}, {cfg.image_size} pixels

One stage of a cascade of diffusion models after
[Imagen](https://arxiv.org/abs/2205.11487), trained with imagen-jax {__version__}.

| | |
|---|---|
| makes | {makes} |
| network | {cfg.model.architecture}, {count:,} parameters (float32, averaged) |
| trained for | {stage.step:,} steps of {cfg.training.batch_size} images |
| predicts | {cfg.diffusion.prediction}, {cfg.diffusion.schedule} schedule |
| text encoder | `{text.encoder}`, {text.length} tokens of width {text.dim} |

All values are in `config.json`.

## How to sample it

```
python -m imagen_jax.sample --stage={folder} --prompt="..." --output=samples
```

The text encoder is not part of this folder: all encoders but the tiny one need
`--encoder_weights`. To train on from these weights:
`--config.training.init_from={folder}`.

## What its publisher has to add

- **License: none is stated.** Until one is, nobody is allowed to use these weights.
- What it was trained on, and what follows from that for its use.
- What it was evaluated on.
"""


def export(workdir: str, output: str, shard_bytes: int) -> list[str]:
    """Writes the newest undamaged average of `workdir`: everything or nothing.

    The config is stored without the paths of its records and first weights. A file has
    at most `shard_bytes` of parameters, if it holds several.
    Returns the names of the files that hold parameters; raises `UserError` for a
    workdir without checkpoints, or an output that is in use or cannot be written.
    """
    import safetensors.numpy

    check_disk(output)
    place = pathlib.Path(output)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{output} exists and is not empty: give a new folder")
    (stage,) = open_stages([workdir])
    params = load(stage, make_mesh(MeshConfig(), jax.devices("cpu")[:1])).params
    cfg = dataclasses.replace(
        stage.cfg,
        data=dataclasses.replace(stage.cfg.data, records=""),
        training=dataclasses.replace(
            stage.cfg.training, init_from="", encoder_weights=""
        ),
    )
    flat = traverse_util.flatten_dict(params, sep=".")
    shards = _shards({name: x.nbytes for name, x in flat.items()}, shard_bytes)
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in flat.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    count = sum(x.size for x in flat.values())
    partial = place.with_name(place.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, names in shards.items():
            arrays = {name: np.asarray(flat[name]) for name in names}
            with appearing(partial / file) as path:
                safetensors.numpy.save_file(arrays, path, {"format": "flax"})
        if len(shards) > 1:
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        described = description(cfg, stage.step) | {"digest": stage.digest}
        config = json.dumps(described, indent=2)
        (partial / CONFIG).write_text(config + "\n")
        (partial / _CARD).write_text(model_card(stage, count, place.resolve().name))
        if place.exists():
            place.rmdir()
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from None
    return list(shards)


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


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string(
        "stage", None, "workdir of a training run, or gs://BUCKET/FOLDER"
    )
    flags.DEFINE_string("output", None, "a new folder")
    flags.DEFINE_float("shard_gb", 5.0, "most gigabytes of one file", lower_bound=0.001)
    flags.mark_flags_as_required(["stage", "output"])


def main() -> None:
    """Exports what the flags ask for."""
    args = flags.FLAGS
    files = export(args.stage, args.output, int(args.shard_gb * 1e9))
    print(f"{len(files)} files of parameters in {printable(args.output)}")
    print(f"Fill in the gaps of its {_CARD} before publishing it")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
