"""Bundles: everything needed to repeat a step with bad numbers on one device.

A bundle is a folder: `bundle.json` (the numbers of the run), `batch.npz` (the batch),
`checkpoints/` (the state before the step) and `config.json`.
"""

import contextlib
import dataclasses
import functools
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from imagen_jax import config as config_lib
from imagen_jax import sharding
from imagen_jax.batch import Batch, batch_spec, check_batch
from imagen_jax.compilation import compiler_options
from imagen_jax.config import MeshConfig, StageConfig
from imagen_jax.errors import UserError, read_json
from imagen_jax.models import network
from imagen_jax.training.bad_updates import before_the_last_skip
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import deal, draw, loss_and_gradients

_VERSION = 1
# .npz files have no bfloat16.
_TEXT_BITS = "text_bfloat16_as_uint16"


@dataclasses.dataclass(frozen=True)
class Replay:
    """A repeated step.

    Attributes:
      step: the step's number.
      recorded: "loss" and "gradient_norm" of the run.
      here: what `examine` found on one device.
    """

    step: int
    recorded: dict[str, float]
    here: dict[str, Any]


def examine(
    state: TrainState, batch: Batch, cfg: StageConfig, mesh: Mesh
) -> dict[str, Any]:
    """Numbers of the step after `state` that show where they first go bad.

    Returns:
      "loss" and "gradient_norm"; "examples", a list with each one's "id", "logsnr",
      "loss" and "text" (the largest absolute value of its embeddings); and by name the
      largest absolute values of "parameters", "layers" (the outputs, in the order of
      the forward pass) and "gradients" (in the order of the backward pass). All floats.
    """
    run = compile_examine(cfg, mesh)
    found = jax.device_get(run(state.params, state.step, batch))
    layers = {k: float(v) for layer in found["layers"] for k, v in layer.items()}
    order = {name.split("[")[0]: place for place, name in enumerate(layers)}

    def by_name(tree):
        return {name: float(v) for name, v in flatten_dict(tree, sep="/").items()}

    def place(parameter):
        return order.get(parameter[0].rpartition("/")[0], len(order))

    columns, rows = found["examples"], range(cfg.training.batch_size)
    gradients = by_name(found["gradients"]).items()
    return {
        "loss": float(found["loss"]),
        "gradient_norm": float(found["gradient_norm"]),
        "examples": [{n: columns[n][row].item() for n in columns} for row in rows],
        "parameters": by_name(found["parameters"]),
        "layers": layers,
        "gradients": dict(sorted(gradients, key=place, reverse=True)),
    }


@functools.cache
def compile_examine(cfg: StageConfig, mesh: Mesh) -> Callable[..., dict[str, Any]]:
    """The jitted part of `examine`: a function of parameters, step and batch."""
    return jax.jit(
        sharding.on_mesh(functools.partial(_examine, cfg=cfg), mesh),
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler_options(mesh),
    )


def _examine(params, step, batch, *, cfg):
    noised, key = draw(step, batch, cfg)
    each, gradients = loss_and_gradients(params, noised, key, cfg)

    def layers(part):
        number, noised = part
        own = key
        if key is not None and cfg.training.microbatches > 1:
            own = jax.random.fold_in(key, number)
        return network.layer_maxima(
            cfg.model, params, noised.z, noised.logsnr, noised.cond, own
        )

    parts = cfg.training.microbatches
    found = jax.lax.map(layers, (jnp.arange(parts), deal(noised, parts)))

    def largest(x):
        return jnp.abs(x).max()

    return {
        "loss": each.mean(),
        "gradient_norm": optax.tree.norm(gradients),
        "examples": {
            "id": batch.id,
            "logsnr": noised.logsnr,
            "loss": each,
            "text": jnp.abs(batch.text.astype(jnp.float32)).max((1, 2)),
        },
        "parameters": jax.tree.map(largest, params),
        "layers": jax.tree.map(lambda x: x.max(0), found),
        "gradients": jax.tree.map(largest, gradients),
    }


def first_not_finite(found: Mapping[str, Any]) -> str:
    """The first place at which what `examine` found is not finite, "" for none."""
    examples = found["examples"]
    values = [
        *((f"the text embeddings of example {e['id']}", e["text"]) for e in examples),
        *((f"the parameter {n}", v) for n, v in found["parameters"].items()),
        *((f"the output of layer {n}", v) for n, v in found["layers"].items()),
        *((f"the loss of example {e['id']}", e["loss"]) for e in examples),
        *((f"the gradient of parameter {n}", v) for n, v in found["gradients"].items()),
        ("the gradient norm", found["gradient_norm"]),
    ]
    return next((name for name, value in values if not np.isfinite(value)), "")


def write_bundle(
    workdir: str,
    state: TrainState,
    batch: Batch,
    position: bytes,
    cfg: StageConfig,
    mesh: Mesh,
    recorded: Mapping[str, float],
) -> tuple[epath.Path, str]:
    """Writes `workdir/bundles/STEP`. All processes must call this together.

    Args:
      workdir: the run's workdir.
      state: the state after the step, whose update was skipped.
      batch: the batch of the step.
      position: where the data source stood before the batch.
      cfg: the stage.
      mesh: the run's mesh.
      recorded: "loss" and "gradient_norm" as the step computed them.

    Returns:
      The folder, and what `first_not_finite` says.
    """
    step = int(state.step)
    folder = epath.Path(workdir) / "bundles" / str(step)
    before = state.replace(step=state.step - 1, guard=before_the_last_skip(state.guard))
    with contextlib.closing(Checkpointer(str(folder), cfg.training)) as checkpointer:
        checkpointer.save(before, cfg, position)
    found = examine(before, batch, cfg, mesh)
    cause = first_not_finite(found)
    whole = multihost_utils.process_allgather(batch, tiled=True)
    if jax.process_index() == 0:
        (folder / "config.json").write_text(config_lib.to_json(cfg))
        arrays = {"image": whole.image, "mask": whole.mask, "id": whole.id}
        arrays[_TEXT_BITS] = whole.text.view(np.uint16)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        (folder / "batch.npz").write_bytes(file.getvalue())
        guard = state.guard
        record = {
            "schema_version": _VERSION,
            "step": step,
            "recorded": recorded,
            "averages": {n: float(getattr(guard, n)) for n in recorded},
            "skipped_updates": int(guard.skipped),
            "mesh": dict(mesh.shape),
            "row_shards": sharding.row_shards(mesh),
            "first_not_finite": cause,
            "found": found,
        }
        # The last file, so that a folder with it is complete.
        text = json.dumps(_with_words(record), indent=1, allow_nan=False)
        (folder / "bundle.json").write_text(text + "\n")
    return folder, cause


def _with_words(value: Any) -> Any:
    """The value with numbers that JSON does not have as "nan" and "inf"."""
    if isinstance(value, Mapping):
        return {name: _with_words(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_with_words(v) for v in value]
    return value if not isinstance(value, float) or np.isfinite(value) else str(value)


def replay(bundle: str) -> Replay:
    """Repeats the step of a bundle on the first device.

    Each microbatch holds the rows of one device of the run, unless there is dropout:
    its masks depend on the microbatches.

    Raises:
      UserError: for a folder that is no bundle, or a damaged one.
    """
    folder = epath.Path(bundle)
    path = folder / "bundle.json"
    record = read_json(path, "the record of a bundle (--replay=WORKDIR/bundles/STEP)")
    if (version := record.get("schema_version")) != _VERSION:
        what = f"{path} has schema version {version}, not {_VERSION}"
        raise UserError(f"{what}: use the release that wrote it")
    with contextlib.closing(Checkpointer(bundle)) as checkpointer:
        before = checkpointer.required()
        cfg = checkpointer.stage(before)
        microbatches = cfg.training.microbatches
        if not cfg.model.dropout:
            microbatches *= record["row_shards"]
        training = dataclasses.replace(cfg.training, microbatches=microbatches)
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(), training=training)
        mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
        state, _ = checkpointer.restore(cfg, mesh, before)
    batch = jax.device_put(
        _read_batch(folder / "batch.npz", cfg), sharding.batch_sharding(mesh)
    )
    recorded = {name: float(value) for name, value in record["recorded"].items()}
    return Replay(record["step"], recorded, examine(state, batch, cfg, mesh))


def _read_batch(path: epath.Path, cfg: StageConfig) -> Batch:
    try:
        arrays = dict(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
        text = arrays.pop(_TEXT_BITS).view(jnp.bfloat16)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} is missing or damaged: copy it again") from None
    batch = Batch(text=text, **arrays)
    check_batch(batch, batch_spec(cfg))
    return batch
