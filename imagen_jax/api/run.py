"""A training run: a config, its records and a workdir."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig, from_dict
from imagen_jax.data.pipeline import Stream, open_records, open_sources
from imagen_jax.errors import printable
from imagen_jax.sharding import make_mesh, replicated, unused_gpu
from imagen_jax.stores import check_store
from imagen_jax.training.loop import train
from imagen_jax.training.metrics import Stopwatch
from imagen_jax.training.state import TrainState


def resolve(values: Mapping[str, Any]) -> StageConfig:
    """The stage of a config's values, with the text of its records filled in.

    Raises:
      UserError: for wrong values, or records that do not exist or do not fit.
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
    batches = open_records(cfg, mesh)
    preview = None
    if cfg.training.sample_every_steps:
        preview = _peek(batches, cfg.training.preview_images, mesh)
    return train(cfg, workdir, batches, mesh, preview, stopwatch)


def _peek(batches: Stream, count: int, mesh: Mesh) -> Batch:
    """The first `count` examples, on every host; the iterator stays where it is."""
    state = batches.get_state()
    batch = next(batches)
    batches.set_state(state)
    first = jax.jit(
        lambda batch: jax.tree.map(lambda x: x[:count], batch),
        out_shardings=replicated(mesh),
    )
    return jax.device_get(first(batch))
