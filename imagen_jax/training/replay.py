"""Bundles: what is needed to do a step of bad numbers again, on one device.

A bundle is a folder: `bundle.json` (what was seen), `batch.npz` (the batch),
`checkpoints/` (the state before the step) and `config.json`.
"""

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
from imagen_jax.barrier import wait_for_all
from imagen_jax.batch import Batch, batch_spec, check_batch
from imagen_jax.compilation import compiler_options
from imagen_jax.config import MeshConfig, StageConfig
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.sharding import (
    batch_sharding,
    make_mesh,
    on_mesh,
    replicated,
    row_shards,
)
from imagen_jax.training.bad_updates import before_the_last_skip
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import deal, draw, loss_and_gradients

_VERSION = 1
# Of a bundle.json, far more than one has.
_RECORD_BYTES = 2**28
# numpy's files have no bfloat16.
_TEXT_BITS = "text_bfloat16_as_uint16"


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step of a bundle, done again.

    Attributes:
      step: its number.
      recorded: "loss" and "gradient_norm" of the run.
      here: `examine` of the step, done on one device.
    """

    step: int
    recorded: dict[str, float]
    here: dict[str, Any]


def examine(
    state: TrainState, batch: Batch, cfg: StageConfig, mesh: Mesh
) -> dict[str, Any]:
    """Everything about the step after `state` that tells where numbers go bad.

    Args:
      state: before the step.
      batch: of the step; both lie on `mesh`.
      cfg: the stage.
      mesh: of the state.

    Returns:
      "loss" and "gradient_norm"; "examples", a list with "id", "logsnr", "loss" and
      "text" (the largest absolute value of its embeddings) of each; and the largest
      absolute values "parameters", "layers" (in the order of the forward pass) and
      "gradients" (in that of the backward pass) by name. All floats.
    """
    run = compile_examine(cfg, mesh)
    found = jax.device_get(run(state.params, state.step, batch))
    layers = {k: float(v) for layer in found["layers"] for k, v in layer.items()}
    order = {name.split("[")[0]: place for place, name in enumerate(layers)}
    parameters, gradients = (
        {"/".join(path): float(v) for path, v in flatten_dict(found[tree]).items()}
        for tree in ("parameters", "gradients")
    )

    def place(parameter):
        return order.get(parameter.rpartition("/")[0], len(order))

    columns = found["examples"]
    return {
        "loss": float(found["loss"]),
        "gradient_norm": float(found["gradient_norm"]),
        "examples": [
            {name: columns[name][row].item() for name in columns}
            for row in range(cfg.training.batch_size)
        ],
        "parameters": parameters,
        "layers": layers,
        "gradients": {
            name: gradients[name] for name in sorted(gradients, key=place, reverse=True)
        },
    }


@functools.cache
def compile_examine(cfg: StageConfig, mesh: Mesh) -> Callable[..., dict[str, Any]]:
    """The jitted part of `examine`, of parameters, step and batch."""
    return jax.jit(
        on_mesh(functools.partial(_examine, cfg=cfg), mesh),
        out_shardings=replicated(mesh),
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
    """Where numbers go bad first, of what `examine` found; "" for nowhere."""
    for example in found["examples"]:
        if not np.isfinite(example["text"]):
            return f"the text embeddings of example {example['id']}"
    for kind, title in (
        ("parameters", "the parameter"),
        ("layers", "the output of layer"),
    ):
        for name, value in found[kind].items():
            if not np.isfinite(value):
                return f"{title} {name}"
    for example in found["examples"]:
        if not np.isfinite(example["loss"]):
            return f"the loss of example {example['id']}"
    for name, value in found["gradients"].items():
        if not np.isfinite(value):
            return f"the gradient of parameter {name}"
    return "" if np.isfinite(found["gradient_norm"]) else "the gradient norm"


def write_bundle(
    workdir: str,
    state: TrainState,
    batch: Batch,
    position: bytes,
    cfg: StageConfig,
    mesh: Mesh,
    recorded: Mapping[str, float],
) -> tuple[epath.Path, str]:
    """Writes `workdir/bundles/STEP`; every process calls it, process 0 writes most.

    Args:
      workdir: of the run.
      state: after the step, whose update was skipped.
      batch: of the step, on `mesh`.
      position: of the data source before the batch.
      cfg: the stage.
      mesh: of the run.
      recorded: "loss" and "gradient_norm" as the step told them.

    Returns:
      The folder, and what was not finite first ("" for nothing, a spike).
    """
    step = int(state.step)
    folder = epath.Path(workdir) / "bundles" / str(step)
    before = state.replace(step=state.step - 1, guard=before_the_last_skip(state.guard))
    checkpointer = Checkpointer(str(folder), cfg.training)
    checkpointer.save(before, cfg, position)
    checkpointer.close()
    found = examine(before, batch, cfg, mesh)
    wait_for_all("collect the batch of a bundle")
    whole = jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), batch
    )
    if jax.process_index() == 0:
        (folder / "config.json").write_text(config_lib.to_json(cfg))
        arrays = {"image": whole.image, "mask": whole.mask, "id": whole.id}
        arrays[_TEXT_BITS] = whole.text.view(np.uint16)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        (folder / "batch.npz").write_bytes(file.getvalue())
        record = {
            "schema_version": _VERSION,
            "step": step,
            "recorded": recorded,
            "averages": {
                "loss": float(state.guard.loss),
                "gradient_norm": float(state.guard.gradient_norm),
            },
            "skipped_updates": int(state.guard.skipped),
            "mesh": dict(mesh.shape),
            "row_shards": row_shards(mesh),
            "first_not_finite": first_not_finite(found),
            "found": found,
        }
        # Last, so that a folder with it is whole.
        text = json.dumps(_spelt(record), indent=1, allow_nan=False) + "\n"
        (folder / "bundle.json").write_text(text)
    return folder, first_not_finite(found)


def _spelt(value):
    """JSON has no NaN and no infinity: "nan", "inf"; `float` reads both kinds."""
    if isinstance(value, Mapping):
        return {name: _spelt(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_spelt(v) for v in value]
    return value if not isinstance(value, float) or np.isfinite(value) else str(value)


def replay(bundle: str) -> Replay:
    """Does the step of a bundle again, on the first device.

    Each microbatch is what a device of the run had, unless the network has dropout,
    whose masks depend on them.

    Raises:
      UserError: for a folder that is no bundle, or a damaged one.
    """
    folder = epath.Path(bundle)
    path = folder / "bundle.json"
    if not path.exists():
        raise UserError(
            f"--replay={bundle} is no bundle (there is no bundle.json in it): give "
            "the folder WORKDIR/bundles/STEP that the stopped run named"
        )
    try:
        # A pipe has no length, and reading it might not end.
        if not 0 < path.stat().length < _RECORD_BYTES:
            raise ValueError("it is no file of a bundle")
        record = json.loads(path.read_bytes())
        if record["schema_version"] != _VERSION:
            raise UserError(
                f"{path} has schema version {record['schema_version']}, this program "
                f"reads {_VERSION}: use the release that wrote it"
            )
        step, shards = int(record["step"]), int(record["row_shards"])
        recorded = {n: float(record["recorded"][n]) for n in ("loss", "gradient_norm")}
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path, error) from None

    try:
        checkpointer = Checkpointer(bundle)
        cfg = checkpointer.stage()
        if cfg.model.dropout:
            shards = 1
        training = dataclasses.replace(
            cfg.training, microbatches=cfg.training.microbatches * shards
        )
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(), training=training)
        mesh = make_mesh(cfg.mesh, jax.devices()[:1])
        state, _ = checkpointer.restore(cfg, mesh)
        checkpointer.close()
    except UserError:
        raise
    except Exception as error:  # Orbax has no exception of its own for a bad file.
        raise _damaged(folder / "checkpoints", error) from None
    batch = jax.device_put(_read_batch(folder, cfg), batch_sharding(mesh))
    return Replay(step, recorded, examine(state, batch, cfg, mesh))


def _read_batch(folder: epath.Path, cfg: StageConfig) -> Batch:
    path = folder / "batch.npz"
    try:
        with (
            path.open("rb") as opened,
            np.load(opened, allow_pickle=False) as file,
        ):
            batch = Batch(
                image=file["image"],
                text=file[_TEXT_BITS].view(jnp.bfloat16),
                mask=file["mask"],
                id=file["id"],
            )
    except (OSError, EOFError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise _damaged(path, error) from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from None
    check_batch(batch, batch_spec(cfg))
    return batch


def _damaged(path: epath.Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(
        f"{path} is damaged ({reason}): copy the whole bundle again from where it was "
        "written"
    )
