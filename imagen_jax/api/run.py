"""What doors share of a training run."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imagen_jax.barrier import wait_for_all
from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig, from_dict
from imagen_jax.data.manifest import with_text
from imagen_jax.data.mixture import read_parts
from imagen_jax.data.source import open_records
from imagen_jax.sharding import make_mesh
from imagen_jax.training.loop import BatchIterator, train
from imagen_jax.training.state import TrainState
from imagen_jax.training.stopwatch import Stopwatch


def resolve(values: Mapping[str, Any]) -> StageConfig:
    """A config's values, completed by what its records say of their text.

    Raises:
      UserError: for values or records that are not right.
    """
    cfg = from_dict(values)
    return with_text(cfg, read_parts(cfg.data.records)[0].manifest)


def train_stage(cfg: StageConfig, workdir: str) -> TrainState:
    """Trains the stage `cfg` in `workdir`, from its newest checkpoint or from scratch.

    Raises:
      UserError: for records, a mesh or a workdir that do not fit.
      Stopped: on SIGINT or SIGTERM, after saving.
    """
    stopwatch = Stopwatch()
    mesh = make_mesh(cfg.mesh)
    batches = open_records(cfg, mesh)
    preview = None
    if cfg.training.sample_every_steps:
        preview = _peek(batches, cfg.training.preview_images)
    return train(cfg, workdir, batches, mesh, preview, stopwatch)


def _peek(batches: BatchIterator, count: int) -> Batch:
    """The first examples, on every host; the iterator stays where it is."""
    state = batches.get_state()
    batch = next(batches)
    batches.set_state(state)
    wait_for_all("collect the examples of the preview")
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True))[:count],
        batch,
    )
