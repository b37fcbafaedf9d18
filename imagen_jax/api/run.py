"""A training run: a config, its records and a workdir."""

import dataclasses
import functools
import os
import pathlib
import runpy
import shlex
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from imagen_jax.batch import pad_text
from imagen_jax.config import StageConfig, from_dict
from imagen_jax.data.pipeline import (
    OwnBatches,
    Stream,
    open_batches,
    open_records,
    open_sources,
    read_heldout,
)
from imagen_jax.errors import UserError, printable
from imagen_jax.models import network
from imagen_jax.sharding import make_mesh, unused_gpu
from imagen_jax.stores import check_store
from imagen_jax.text.encoders import load_encoder
from imagen_jax.training import loop
from imagen_jax.training.metrics import Stopwatch
from imagen_jax.training.preview import Preview
from imagen_jax.training.state import TrainState

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def train(
    config: Any,
    records: str | os.PathLike | OwnBatches,
    workdir: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains a stage, or goes on with it, as the command `train` does.

    Args:
      config: a `StageConfig`, what `get_config` of a config's file returns, or the
        file, or one of ours: "own.py:base", "tiny:base".
      records: as `config.data.records`, or one's own batches: see `open_batches`.
        With these the config says what their text is: `text.length`, `text.dim` and
        `text.encoder`, which is to embed the prompts when the stage is sampled.
      workdir: a folder or gs://BUCKET/FOLDER.
      overrides: values of the config: `{"training.steps": 1000}`.

    Returns:
      The state after the last step.

    Raises:
      UserError: for a value, records or a workdir that do not fit.
      Stopped: on SIGINT or SIGTERM, after saving.
    """
    if isinstance(config, str):
        try:
            config = run_config(config)
        except ValueError as error:
            raise UserError(f"the config cannot be used: {error}") from None
    is_stage = isinstance(config, StageConfig)
    values = dataclasses.asdict(config) if is_stage else config.to_dict()
    for name, value in (overrides or {}).items():
        *groups, field = name.split(".")
        group = functools.reduce(lambda g, key: g.setdefault(key, {}), groups, values)
        group[field] = value
    if not isinstance(records, str | os.PathLike):
        return train_stage(from_dict(values), os.fspath(workdir), records)
    values["data"]["records"] = os.fspath(records)
    return train_stage(resolve(values), os.fspath(workdir))


def run_config(text: str) -> Any:
    """What NAME[:VARIANT] or FILE.py[:VARIANT] makes, or a `ValueError` of one line.

    A NAME is that of a config of the package, whatever the working directory holds.
    """
    name, *variant = text.split(":", 1)
    named = {file.stem: str(file) for file in sorted(_CONFIGS.glob("[a-z]*.py"))}
    name = named.get(name, name)
    if not os.path.isfile(name):
        raise ValueError(
            f"there is no file {name!r}; give FILE.py or one of {', '.join(named)}, "
            "with :VARIANT if it has some"
        )
    try:
        defined = runpy.run_path(name)
        if "get_config" not in defined:
            raise ValueError(f"{name} defines no get_config()")
        return defined["get_config"](*variant)
    except Exception as error:
        why = " ".join(str(error).split())
        if isinstance(error, ValueError):  # names no line: it is for the user
            raise ValueError(why) from None
        why = f"{type(error).__name__}: {why}"
        calls = traceback.extract_tb(error.__traceback__)
        own = [call.lineno for call in calls if call.filename == name]
        raise ValueError(f"{why} (line {own[-1]})" if own else why) from None


def resolve(values: Mapping[str, Any]) -> StageConfig:
    """The stage of a config's values, with the text of its records filled in.

    Raises `UserError` for wrong values, or records that do not exist or do not fit.
    """
    return open_sources(from_dict(values))[0]


def train_stage(
    cfg: StageConfig, workdir: str, source: OwnBatches | None = None
) -> TrainState:
    """Trains the stage `cfg` in `workdir`, from its newest checkpoint or from scratch.

    On `config.data.records`, or the batches of `source`; see `open_batches`. Prints one
    line that says on which devices.

    Raises:
      UserError: for records, a mesh or a workdir that do not fit.
      Stopped: on SIGINT or SIGTERM, after saving.
    """
    stopwatch = Stopwatch()
    check_store(workdir)
    network.module(cfg.model)  # known, before anything is written
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
    batches = open_batches(source, mesh) if source else open_records(cfg, mesh)
    preview = None
    if cfg.training.sample_every_steps:
        preview = open_preview(cfg, batches)
    read = functools.cache(functools.partial(read_heldout, cfg, mesh))
    heldout = read if cfg.data.heldout_share else None
    return loop.train(cfg, workdir, batches, mesh, preview, stopwatch, heldout)


def open_preview(cfg: StageConfig, batches: Stream) -> Callable[[], Preview]:
    """Returns a function that reads the first examples, and adds the config's prompts.

    The prompts are encoded at once: their encoder is not in memory during training.
    Raises `UserError` when there is no such encoder, or its weights are not given.
    """
    training, text_cfg = cfg.training, cfg.text
    prompts, more = list(training.preview_prompts), ()
    if prompts:
        encoder = load_encoder(text_cfg.encoder, training.encoder_weights)
        embedded = encoder.encode(prompts, text_cfg.length)
        more = (pad_text(embedded, text_cfg.length, text_cfg.dim),)

    @functools.cache
    def preview() -> Preview:
        first = batches.first(training.preview_images)
        captions = [
            caption.decode("utf8", "ignore") or f"example {number}"
            for caption, number in zip(first.caption, first.id, strict=True)
        ]
        parts = zip((first.text, first.mask), *more)
        text, mask = (np.concatenate(part) for part in parts)
        return Preview(first.image, text, mask, (*captions, *prompts))

    return preview


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
