"""A training run: a config, its records and a workdir."""

import shlex
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from imagen_jax.batch import pad_text
from imagen_jax.config import StageConfig, from_dict
from imagen_jax.data.pipeline import (
    Stream,
    open_records,
    open_sources,
    read_heldout,
)
from imagen_jax.errors import printable
from imagen_jax.sharding import make_mesh, unused_gpu
from imagen_jax.stores import check_store
from imagen_jax.text.encoders import load_encoder
from imagen_jax.training.loop import train
from imagen_jax.training.metrics import Stopwatch
from imagen_jax.training.preview import Preview
from imagen_jax.training.state import TrainState


def resolve(values: Mapping[str, Any]) -> StageConfig:
    """The stage of a config's values, with the text of its records filled in.

    Raises `UserError` for wrong values, or records that do not exist or do not fit.
    """
    return open_sources(from_dict(values))[0]


def train_stage(cfg: StageConfig, workdir: str) -> TrainState:
    """Trains the stage `cfg` in `workdir`, from its newest checkpoint or from scratch.

    Prints one line that says on which devices.

    Raises:
      UserError: for records, a mesh or a workdir that do not fit.
      Stopped: on SIGINT or SIGTERM, after saving.
    """
    stopwatch = Stopwatch()
    check_store(workdir)
    mesh = make_mesh(cfg.mesh)
    if jax.process_index() == 0:
        if hint := unused_gpu():
            print(hint)
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        print(
            f"training {printable(cfg.name)} on {mesh.size} x "
            f"{jax.devices()[0].device_kind} "
            f"({jax.process_count()} processes), mesh {sizes}"
        )
        end, last = cfg.optimizer.decay_steps, cfg.training.steps
        if 0 < end < last:
            print(
                f"the learning rate is 0 from step {end} on, the last is {last}: "
                "config.optimizer.decay_steps says so (0 is the last step)"
            )
    batches = open_records(cfg, mesh)
    preview = None
    if cfg.training.sample_every_steps:
        preview = open_preview(cfg, batches)
    heldout = read_heldout(cfg, mesh) if cfg.data.heldout_share else ()
    return train(cfg, workdir, batches, mesh, preview, stopwatch, heldout)


def open_preview(cfg: StageConfig, batches: Stream) -> Preview:
    """The first examples of the data, and the prompts that the config asks for.

    These are encoded here and now: their encoder is not in memory while it trains.
    Raises `UserError` when there is no such encoder, or its weights are not given.
    """
    training, text_cfg = cfg.training, cfg.text
    first = batches.peek(training.preview_images)
    captions = [
        caption.decode("utf8", "ignore") or f"example {number}"
        for caption, number in zip(first.caption, first.id, strict=True)
    ]
    text, mask, prompts = first.text, first.mask, list(training.preview_prompts)
    if prompts:
        encoder = load_encoder(text_cfg.encoder, training.encoder_weights)
        embedded = encoder.encode(prompts, text_cfg.length)
        more = pad_text(embedded, text_cfg.length, text_cfg.dim)
        text, mask = (np.concatenate(x) for x in zip((text, mask), more))
    return Preview(first.image, text, mask, (*captions, *prompts))


def next_command(cfg: StageConfig, workdir: str) -> str:
    """What to type after a training, to see what it has learnt."""
    where = shlex.quote(workdir)
    output = shlex.quote(f"{workdir.rstrip('/').rpartition('/')[2]}-samples")
    stages = f"--stage={where}"
    if cfg.lowres_size:
        stages = f"--stage=WORKDIR_OF_{cfg.lowres_size}_PIXELS {stages}"
    prompt = (*cfg.training.preview_prompts, "a red circle")[0]
    weights = cfg.training.encoder_weights
    if not weights and cfg.text.encoder.startswith("t5_"):
        weights = "FOLDER"
    more = f" --encoder_weights={shlex.quote(weights)}" if weights else ""
    return (
        f"python -m imagen_jax.sample {stages} --prompt={shlex.quote(prompt)} "
        f"--output={output}{more}"
    )
