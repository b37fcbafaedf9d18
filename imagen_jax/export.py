"""Exports a trained stage's averaged parameters, to be published or sampled elsewhere.

python -m imagen_jax.export --stage=WORKDIR --output=FOLDER

Writes model.safetensors (several files and an index when it is large), config.json
and README.md, a model card whose open places say what its publisher has to fill in.
The folder is a stage for `sample --stage=FOLDER`, and weights to start from for `train
--config.training.init_from=FOLDER`.
"""

import math

import jax
from absl import flags

from imagen_jax import cli
from imagen_jax.api.cascade import Trained, open_stages
from imagen_jax.config import MeshConfig, StageConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import make_mesh
from imagen_jax.training import weights as exported

_CARD = """---
library_name: imagen-jax
pipeline_tag: text-to-image
license: other
license_name: not-stated
---

# {title}

One stage of a cascade of diffusion models after
[Imagen](https://arxiv.org/abs/2205.11487), trained with imagen-jax {version}.

| | |
|---|---|
| makes | {makes} |
| network | {network}, {parameters:,} parameters (exponential moving average, float32) |
| trained for | {step:,} steps of {batch} pictures |
| predicts | {prediction}, {schedule} schedule |
| text encoder | `{encoder}`, {length} tokens of width {dim} |

All values are in `config.json`.

## How to sample it

```
python -m imagen_jax.sample --stage={folder} --prompt="..." --output=pictures
```

{place} The text encoder is not part of this folder: other than the tiny one it needs
`--encoder_weights`. To train on from these weights:
`--config.training.init_from={folder}`.

## What its publisher has to add

- **License: none is stated.** Until one is, nobody is allowed to use these weights.
- What it was trained on, and what follows from that for its use.
- What it was measured on.
"""


def model_card(stage: Trained, parameters: int, folder: str) -> str:
    """Text of README.md for a stage with so many parameters, in `folder`."""
    cfg: StageConfig = stage.cfg
    makes = f"pictures of {cfg.image_size} x {cfg.image_size} pixels from a caption"
    place = "It is the first stage of a cascade."
    if cfg.lowres_size:
        makes += f" and a picture of {cfg.lowres_size} x {cfg.lowres_size}"
        place = (
            f"It enlarges: give `--lowres=PICTURE` of {cfg.lowres_size} pixels, or "
            "`--stage` of the stages before it first."
        )
    return _CARD.format(
        title=f"{cfg.name}, {cfg.image_size} pixels",
        version=exported.description(cfg, stage.step)["written_by"]["imagen_jax"],
        makes=makes,
        network={"unet": "U-Net", "efficient_unet": "Efficient U-Net"}[
            cfg.model.architecture
        ],
        parameters=parameters,
        step=stage.step,
        batch=cfg.training.batch_size,
        prediction=cfg.diffusion.prediction,
        schedule=cfg.diffusion.schedule,
        encoder=cfg.text.encoder,
        length=cfg.text.length,
        dim=cfg.text.dim,
        folder=folder.rstrip("/"),
        place=place,
    )


def export(workdir: str, output: str, shard_bytes: int) -> list[str]:
    """Writes the newest whole checkpoint of `workdir`; returns the files' names.

    Raises:
      UserError: for a workdir without checkpoints, or an output that is in use.
    """
    if "://" in output:
        raise UserError(f"--output={output}: export to a disk, then copy the folder")
    (stage,) = open_stages([workdir])
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    params = stage.load(mesh).params
    count = sum(math.prod(shape) for shape in stage.weights.shapes.values())
    card = model_card(stage, count, output)
    return exported.write(output, params, stage.cfg, stage.step, card, shard_bytes)


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("stage", None, "workdir of a training, or gs://BUCKET/FOLDER")
    flags.DEFINE_string("output", None, "a new folder")
    flags.DEFINE_float(
        "shard_gb", 5.0, "of parameters in one file, at most", lower_bound=0.001
    )
    flags.mark_flags_as_required(["stage", "output"])


def main() -> None:
    """Exports what the flags ask for."""
    args = flags.FLAGS
    files = export(args.stage, args.output, int(args.shard_gb * 1e9))
    print(
        f"{len(files)} files of parameters in {args.output}; fill in the open places "
        f"of its {exported.CARD} before publishing it"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
