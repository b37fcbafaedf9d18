"""What a run does when its budget of skipped updates is spent, and how to see why.

It leaves a bundle, with which the step can be repeated on one device: a folder with
`bundle.json` (the numbers of the run), `batch.npz` (the batch), `checkpoints/` (the
state before the step) and `config.json`.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
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
from imagen_jax.batch import Batch, batch_spec
from imagen_jax.compilation import compiler_options
from imagen_jax.config import MeshConfig, StageConfig
from imagen_jax.errors import UserError, printable
from imagen_jax.files import read_arrays, read_json
from imagen_jax.models import network
from imagen_jax.stores import check_store
from imagen_jax.training.bad_updates import after_rollback, before_the_last_skip
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.metrics import MetricWriter
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import deal, draw, loss_and_gradients

_VERSION = 1
# .npz files have no bfloat16.
_TEXT_BITS = "text_bfloat16_as_uint16"
# Other devices sum in another order, so a replay's numbers agree to this share.
_TOLERANCE = 0.01
# Lines of each of a replay's tables.
_SHOWN = 8


@dataclasses.dataclass
class Recovery:
    """Leaves a bundle, then stops the run or rolls it back.

    Once the budget is spent the devices leave the state as it is, so it is still there
    when the host notices, up to two log intervals later. The batch is read again.
    """

    cfg: StageConfig
    batches: Any  # as in `loop.train`
    mesh: Mesh
    checkpointer: Checkpointer
    writer: MetricWriter
    rolled_back_to: int | None = None

    def __post_init__(self):
        kept = 2 * self.cfg.training.log_every_steps + 1
        self.positions = collections.deque(maxlen=kept)

    def note(self, step: int) -> None:
        """Remembers where the data source stands before the batch of `step`."""
        self.positions.append((step, self.batches.get_state()))

    def recover(self, state: TrainState, recorded: dict[str, float]) -> TrainState:
        """The state to go on from; the data source then stands after the bad batch.

        `state` is that after the step that spent the budget, and freed; `recorded` has
        the step's "loss" and "gradient_norm". Raises `UserError` when the run is to
        stop, or was rolled back to the same checkpoint before.
        """
        step, training = int(state.step), self.cfg.training
        folder, cause = self._write_bundle(state, recorded)
        newest, action = self.checkpointer.newest(), training.on_spent_budget
        if newest in (None, self.rolled_back_to):
            action = "stop"
        self.writer.event("budget_spent", step, bundle=str(folder), action=action)
        if action == "stop":
            raise UserError(
                f"stopped at step {step} of {self.checkpointer.workdir}: the budget of "
                "skipped updates, training.skip_budget_steps="
                f"{training.skip_budget_steps}, is spent (loss "
                f"{recorded['loss']:.6g}, gradient norm "
                f"{recorded['gradient_norm']:.6g}; first not finite: "
                f"{cause or 'nothing'}; newest checkpoint: {newest}). See why: python "
                f"-m imagen_jax.train --replay={folder}. Go on with the next data: "
                "--config.training.on_spent_budget=rollback"
            )
        skipped_to = state.step
        # There may be no room for two states.
        for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
            leaf.delete()
        good, _ = self.checkpointer.restore(self.cfg, self.mesh, newest)
        self.rolled_back_to = newest
        self.writer.event("rollback", step, to=newest)
        guard = after_rollback(good.guard, skipped_to - good.step)
        return good.replace(step=skipped_to, guard=guard)

    def _write_bundle(
        self, state: TrainState, recorded: dict[str, float]
    ) -> tuple[epath.Path, str]:
        """Writes `workdir/bundles/STEP`; returns it, and `first_not_finite`."""
        step, guard = int(state.step), state.guard
        position = dict(self.positions)[step]
        self.batches.set_state(position)
        batch = next(self.batches)
        folder = epath.Path(self.checkpointer.workdir) / "bundles" / str(step)
        before = state.replace(step=state.step - 1, guard=before_the_last_skip(guard))
        own = Checkpointer(str(folder), self.cfg.training)
        with contextlib.closing(own):
            own.save(before, self.cfg, position)
        found = examine(before, batch, self.cfg, self.mesh)
        cause = first_not_finite(found)
        whole = multihost_utils.process_allgather(batch, tiled=True)
        if jax.process_index() == 0:
            (folder / "config.json").write_text(config_lib.to_json(self.cfg))
            arrays = {"image": whole.image, "mask": whole.mask, "id": whole.id}
            arrays[_TEXT_BITS] = whole.text.view(np.uint16)
            file = io.BytesIO()
            np.savez_compressed(file, **arrays)
            (folder / "batch.npz").write_bytes(file.getvalue())
            record = {
                "schema_version": _VERSION,
                "step": step,
                "recorded": recorded,
                "averages": {n: float(getattr(guard, n)) for n in recorded},
                "skipped_updates": int(guard.skipped),
                "mesh": dict(self.mesh.shape),
                "row_shards": sharding.row_shards(self.mesh),
                "first_not_finite": cause,
                "found": found,
            }
            # JSON has no NaN and no infinity: here they are the words "nan" and "inf".
            record = json.loads(
                json.dumps(record), parse_constant=lambda word: str(float(word))
            )
            # The last file, so that a folder with it is complete.
            (folder / "bundle.json").write_text(json.dumps(record, indent=1) + "\n")
        return folder, cause


def examine(
    state: TrainState, batch: Batch, cfg: StageConfig, mesh: Mesh
) -> dict[str, Any]:
    """Numbers of the step after `state` that show where they first go bad.

    Returns:
      "loss" and "gradient_norm"; "examples", a list with each one's "id", "logsnr",
      "loss" and "text" (the largest absolute value of its embeddings); and by name the
      largest absolute values of "parameters", "layers" (the outputs, in the order of
      the forward pass) and "gradients" (in the order of the backward pass).
    """
    found = compile_examine(cfg, mesh)(state.params, state.step, batch)
    found = jax.tree.map(lambda x: x.tolist(), jax.device_get(found))
    columns = found["examples"]
    layers = {name: x for layer in found["layers"] for name, x in layer.items()}
    gradients = flatten_dict(found["gradients"], sep="/")
    order = {name.split("[")[0]: place for place, name in enumerate(layers)}

    def place(parameter):
        return order.get(parameter.rpartition("/")[0], len(order))

    names = sorted(gradients, key=place, reverse=True)
    return found | {
        "examples": [dict(zip(columns, row)) for row in zip(*columns.values())],
        "parameters": flatten_dict(found["parameters"], sep="/"),
        "layers": layers,
        "gradients": {name: gradients[name] for name in names},
    }


@functools.cache
def compile_examine(cfg: StageConfig, mesh: Mesh) -> Callable[..., dict[str, Any]]:
    """The jitted part of `examine`: a function of parameters, step and batch."""

    def largest(x):
        return jnp.abs(x).max()

    def run(params, step, batch):
        noised, key = draw(step, batch, cfg)
        each, gradients = loss_and_gradients(params, noised, key, cfg)
        parts = cfg.training.microbatches

        def layers(part):
            number, noised = part
            own = key
            if key is not None and parts > 1:
                own = jax.random.fold_in(key, number)
            return network.layer_maxima(
                cfg.model, params, noised.z, noised.logsnr, noised.cond, own
            )

        found = jax.lax.map(layers, (jnp.arange(parts), deal(noised, parts)))
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

    return jax.jit(
        sharding.on_mesh(run, mesh),
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler_options(mesh, cfg.model.dtype),
    )


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
    return next((name for name, value in values if not math.isfinite(value)), "")


def replay(bundle: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Repeats the step of a bundle on the first device.

    Each microbatch holds as many rows as one device of the run, unless there is
    dropout: its masks depend on the microbatches. Returns the bundle's record, and what
    `examine` finds here; raises `UserError` for a damaged bundle or another folder.
    """
    check_store(bundle)
    folder = epath.Path(bundle)
    record = _read_record(folder / "bundle.json")
    with contextlib.closing(Checkpointer(bundle)) as checkpointer:
        before = checkpointer.required()
        cfg = checkpointer.stage(before)
        microbatches = cfg.training.microbatches
        if not cfg.model.dropout:
            microbatches *= record["row_shards"]
        training = dataclasses.replace(cfg.training, microbatches=microbatches)
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(), training=training)
        mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
        name = "training.batch_size"
        sharding.check_batch_size(cfg.training.batch_size, mesh, name, microbatches)
        state, _ = checkpointer.restore(cfg, mesh, before)
    batch = jax.device_put(
        _read_batch(folder / "batch.npz", cfg), sharding.batch_sharding(mesh)
    )
    return record, examine(state, batch, cfg, mesh)


def _read_record(path: epath.Path) -> dict[str, Any]:
    record = read_json(path, "the record of a bundle (--replay=WORKDIR/bundles/STEP)")
    if (version := record.get("schema_version")) != _VERSION:
        what = f"{path} has schema version {version}, not {_VERSION}"
        raise UserError(f"{what}: use the release that wrote it")
    try:
        values, is_right = record["recorded"], type(record["row_shards"]) is int
        record["recorded"] = {n: float(values[n]) for n in ("loss", "gradient_norm")}
    except (KeyError, TypeError, ValueError):
        is_right = False
    if not (is_right and "step" in record):
        raise UserError(f"{path} is damaged: copy the bundle again")
    return record


def _read_batch(path: epath.Path, cfg: StageConfig) -> Batch:
    spec = {name: x for name, x in vars(batch_spec(cfg)).items() if x is not None}
    expected = {name: (x.dtype.str, x.shape) for name, x in spec.items()}
    expected[_TEXT_BITS] = "<u2", expected.pop("text")[1]
    arrays = read_arrays(path, "the batch of a bundle", expected)
    return Batch(text=arrays.pop(_TEXT_BITS).view(jnp.bfloat16), **arrays)


def print_replay(bundle: str) -> None:
    """Repeats the step of a bundle and prints its numbers beside the run's."""
    record, found = replay(bundle)
    print(f"step {printable(record['step'])}, done again on one device\n")
    print(f"{'':16}{'in the run':>16}{'here':>16}")
    same = True
    for name, was in record["recorded"].items():
        was, now = float(was), found[name]
        print(f"{name.replace('_', ' '):16}{was:16.8g}{now:16.8g}")
        both_bad = not math.isfinite(now) and not math.isfinite(was)
        same &= both_bad or math.isclose(now, was, rel_tol=_TOLERANCE)
    print(f"\nthe numbers {'agree' if same else 'DO NOT AGREE'} (to {_TOLERANCE:.0%})")
    print(f"first not finite: {first_not_finite(found) or 'nothing'}")
    found["losses"] = {
        f"of example {e['id']} at log-SNR {e['logsnr']:.4g}": e["loss"]
        for e in found["examples"]
    }
    for kind in ("losses", "parameters", "layers", "gradients"):
        values = found[kind]
        bad = sum(not math.isfinite(value) for value in values.values())
        print(f"\n{kind}: {bad} of {len(values)} not finite; the largest are")
        ranks = {n: np.nan_to_num(v, nan=np.inf) for n, v in values.items()}
        for name in sorted(ranks, key=ranks.get, reverse=True)[:_SHOWN]:
            print(f"{values[name]:16.6g}  {name}")
