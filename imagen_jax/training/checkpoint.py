"""Checkpoints: asynchronous, atomic, and knowing what they are.

A step's folder has four items: `ema` (all that sampling needs), `train` (the rest of
the state), `config` (the resolved stage) and `iterator` (bytes of the data source that
this file does not understand, one entry per process).
"""

import base64
import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from imagen_jax import config as config_lib
from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.training.guard import new_guard
from imagen_jax.training.state import TrainState, abstract_state

# 2 has a guard; what a run of 1 has skipped it does not know.
SCHEMA_VERSION = 2
_READ = (1, 2)


class Checkpointer:
    """The `checkpoints` folder of one training workdir."""

    def __init__(self, workdir: str, keep: int | None = None):
        """Opens (and makes, when `keep` is given) `workdir/checkpoints`.

        Args:
          workdir: of a training run, local or gs://.
          keep: how many of the newest stay; None to read only.
        """
        self.workdir = workdir
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, read_only=keep is None
        )
        folder = epath.Path(workdir).expanduser().resolve() / "checkpoints"
        self.manager = ocp.CheckpointManager(folder, options=options)

    def save(self, state: TrainState, cfg: StageConfig, iterator: bytes) -> None:
        """Starts writing `state`; returns once it is copied off the device."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        train = {
            "step": state.step,
            "params": state.params,
            "opt": state.opt_state,
            "guard": state.guard,
        }
        description = {
            "schema_version": SCHEMA_VERSION,
            "stage": dataclasses.asdict(cfg),
        }
        self.manager.save(
            step,
            args=ocp.args.Composite(
                ema=ocp.args.StandardSave(state.ema),
                train=ocp.args.StandardSave(train),
                config=ocp.args.JsonSave(description),
                iterator=ocp.args.JsonSave(_gather(iterator)),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, None when there is none."""
        return self.manager.latest_step()

    def restore(self, cfg: StageConfig, mesh: Mesh) -> tuple[TrainState, bytes]:
        """The newest state, placed on `mesh`, and this process's iterator bytes."""
        step = self._newest()
        like = abstract_state(cfg, mesh)
        train = {"step": like.step, "params": like.params, "opt": like.opt_state}
        if self._version_and_stage(step)[0] > 1:
            train["guard"] = like.guard
        found = self.manager.restore(
            step,
            args=ocp.args.Composite(
                ema=ocp.args.StandardRestore(like.ema),
                train=ocp.args.StandardRestore(train),
                iterator=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(
            step=found.train["step"],
            params=found.train["params"],
            ema=found.ema,
            opt_state=found.train["opt"],
            guard=found.train.get("guard")
            or jax.device_put(new_guard(), like.step.sharding),
        )
        iterator = found.iterator.get(str(jax.process_index()))
        if iterator is None:
            raise UserError(
                f"the checkpoint {step} of {self.workdir} was written by "
                f"{len(found.iterator)} processes, there are {jax.process_count()} now"
            )
        return state, base64.b64decode(iterator)

    def stage(self) -> StageConfig:
        """The resolved config that the newest checkpoint was trained with."""
        _, stage = self._version_and_stage(self._newest())
        return config_lib.from_json(json.dumps(stage))

    def ema(self, cfg: StageConfig, mesh: Mesh, step: int):
        """The averaged parameters at a saved step, placed on `mesh`."""
        like = abstract_state(cfg, mesh).ema
        found = self.manager.restore(
            step, args=ocp.args.Composite(ema=ocp.args.StandardRestore(like))
        )
        return found.ema

    def wait(self) -> None:
        """Waits until the last save is complete."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and frees the folder."""
        self.wait()
        self.manager.close()

    def _version_and_stage(self, step: int) -> tuple[int, dict]:
        found = self.manager.restore(
            step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
        )
        version = found.config["schema_version"]
        if version not in _READ:
            raise UserError(
                f"checkpoint {step} of {self.workdir} has schema version {version}, "
                f"this program reads {SCHEMA_VERSION}: use the release that wrote it"
            )
        return version, found.config["stage"]

    def _newest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise UserError(
                f"{self.workdir} has no complete checkpoint: train this stage first"
            )
        return step


def _gather(mine: bytes) -> dict[str, str]:
    """Every process's bytes, base64, by process index."""
    if jax.process_count() == 1:
        return {"0": base64.b64encode(mine).decode()}
    sizes = multihost_utils.process_allgather(np.asarray(len(mine)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return {
        str(i): base64.b64encode(row[:size].tobytes()).decode()
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True))
    }
