"""Checkpoints: asynchronous, atomic, and self-describing.

The folder of a step has five items: `ema` (all that sampling needs), `train` (the rest
of the state), `config` (the resolved stage), `iterator` (the positions in the data and
in the log) and `verification` (checksums of the other four).
"""

import base64
import dataclasses
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers, type_handlers

from imagen_jax import __version__
from imagen_jax import config as config_lib
from imagen_jax.config import StageConfig, TrainingConfig
from imagen_jax.errors import READ_ONLY, UserError, printable
from imagen_jax.files import read_json
from imagen_jax.training import checksums
from imagen_jax.training.state import TrainState, abstract_state

SCHEMA_VERSION = 2

# The items that resuming and sampling read.
RESUMED = ("config", "ema", "iterator", "train")
SAMPLED = ("config", "ema")

_UNLOGGED = "unlogged"
_FAULT_BYTES = 256


def _is_news(record: logging.LogRecord) -> bool:
    return READ_ONLY not in (told := str(record.msg)) and "registry type" not in told


class Checkpointer:
    """The `checkpoints` folder of one training workdir, local or gs://."""

    def __init__(
        self,
        workdir: str,
        training: TrainingConfig | None = None,
        alone: bool = False,
    ):
        """Opens the folder; `training` says what to keep, None is to read only.

        All processes open it, and call its methods, together; or each `alone`.
        """
        self.workdir = workdir
        # What is wrong with each step that was passed over.
        self.damaged: dict[int, str] = {}
        self._folder = epath.Path(workdir).resolve() / "checkpoints"
        self._training = training
        own = jax.process_index()
        logging.getLogger("absl").addFilter(_is_news)
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=True,
            save_interval_steps=0,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=own if alone else 0,
                active_processes={own} if alone else None,
                barrier_sync_key_prefix=str(own) if alone else None,
            ),
        )
        if training:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_preservation(training),
                # Removes what killed processes left unfinished.
                cleanup_tmp_directories=True,
                # If the folder cannot be made, fail at once instead of after minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                # Orbax stores metrics only if there is a `best_fn`.
                best_fn=_metric(training) if training.keep_best_checkpoints else None,
            )
            if jax.process_count() == 1:
                # By default each device writes a part of what all hold, so that hosts
                # share the work; Orbax compiles a program for each part and shape.
                arrays = type_handlers.ArrayHandler(use_replica_parallel=False)
                type_handlers.register_type_handler(jax.Array, arrays, override=True)
        self.manager = ocp.CheckpointManager(self._folder, options=options)

    def save(
        self,
        state: TrainState,
        cfg: StageConfig,
        position: bytes,
        metrics: Mapping[str, float] | None = None,
        unlogged: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Starts writing `state`; returns once its arrays may be donated.

        `position` is where the data source stands, the same in all processes; by
        `metrics` the best checkpoints are kept; `unlogged` are the metrics of steps
        without a line in the log. Raises `UserError` when the save before this one
        could not be written.
        """
        step = int(state.step)
        self.wait()
        if step in self.manager.all_steps():
            return
        processes = map(str, range(jax.process_count()))
        positions = dict.fromkeys(processes, base64.b64encode(position).decode())
        items = {
            "ema": ocp.args.StandardSave(state.ema),
            "train": ocp.args.StandardSave(_train_item(state)),
            "config": ocp.args.JsonSave(description(cfg, step)),
            "iterator": ocp.args.JsonSave(positions | {_UNLOGGED: list(unlogged)}),
            checksums.ITEM: checksums.Checksums(),
        }
        self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def newest(
        self, items: Collection[str] = RESUMED, most: int | None = None
    ) -> int | None:
        """The newest step with undamaged `items`, None when nothing has been saved.

        None beyond `most`, if that is given. Newer damaged checkpoints are named on
        stderr and, unless this is read-only, moved to `workdir/damaged`. All processes
        must call this together. Raises `UserError` when all are damaged, or the newest
        has another schema version.
        """
        self.wait()
        steps = sorted(self.manager.all_steps(), reverse=True)
        steps = [step for step in steps if most is None or step <= most]
        for place, step in enumerate(steps):
            fault = self._fault(step, items)
            if not fault:
                self.stage(step)  # Of another schema version nothing is read.
                if place and self._training:
                    self._set_aside(steps[:place])
                return step
            self.damaged[step] = fault
            if step != steps[-1] and jax.process_index() == 0:
                text = (
                    f"warning: checkpoint {step} of {self.workdir} is damaged: {fault};"
                    f" it is passed over for {steps[place + 1]}"
                )
                print(printable(text), file=sys.stderr)
        if not steps:
            return None
        lines = "; ".join(f"{step}: {self.damaged[step]}" for step in steps)
        raise UserError(
            f"all checkpoints of {self.workdir} are damaged ({lines}): copy one of "
            "them again, or give a new --workdir"
        )

    def required(
        self, items: Collection[str] = RESUMED, most: int | None = None
    ) -> int:
        """As `newest`, but a `UserError` when nothing has been saved."""
        step = self.newest(items, most)
        if step is None:
            raise UserError(
                f"{self.workdir} has no complete checkpoint: train this stage first"
            )
        return step

    def restore(
        self, cfg: StageConfig, mesh: Mesh, step: int
    ) -> tuple[TrainState, bytes]:
        """The state of a step on `mesh`, and its data position.

        Raises `UserError` when it is a state of another stage, or has no position.
        """
        like = abstract_state(cfg, mesh)
        args = ocp.args.Composite(
            ema=ocp.args.StandardRestore(like.ema),
            train=ocp.args.StandardRestore(_train_item(like)),
        )
        try:
            found = self.manager.restore(step, args=args)
        except ValueError as error:  # Orbax has no error of its own for another tree.
            what = f"checkpoint {step} of {self.workdir}"
            raise UserError(f"{what} is not one of this stage: {error}") from None
        train, positions = dict(found.train), self._json(step, "iterator")
        state = TrainState(ema=found.ema, opt_state=train.pop("opt"), **train)
        try:
            return state, base64.b64decode(positions["0"])
        except (KeyError, TypeError, ValueError):
            what = f"the iterator of checkpoint {step} of {self.workdir}"
            raise UserError(f"{what} holds no position: copy it again") from None

    def unlogged(self, step: int) -> list[dict[str, Any]]:
        """What `save` was given; checkpoints of release 0.1 have none."""
        return self._json(step, "iterator").get(_UNLOGGED, [])

    def stage(self, step: int) -> StageConfig:
        """The config of a step; a `UserError` if this program cannot read it."""
        where = f"the config of checkpoint {step} of {self.workdir}"
        return described_stage(self._json(step, "config"), where)

    def ema(self, like: Any, step: int) -> Any:
        """The averaged parameters of a step, placed like the arrays of `like`."""
        args = ocp.args.Composite(ema=ocp.args.StandardRestore(like))
        return self.manager.restore(step, args=args).ema

    def wait(self) -> None:
        """Waits for the last save; `UserError` when it could not be written."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:  # TensorStore raises ValueErrors.
            # It would print a traceback for every array.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            brief = " ".join(str(error).split())
            raise UserError(
                f"a checkpoint of {self.workdir} cannot be written ({brief}): make "
                "room or repair it, and start the same command again"
            ) from None

    def close(self) -> None:
        """Frees the folder, after `wait`."""
        self.wait()
        self.manager.close()

    def _json(self, step: int, item: str) -> dict[str, Any]:
        path = self._folder / str(step) / item / "metadata"
        return read_json(path, f"the {item} of a checkpoint")

    def _fault(self, step: int, items: Collection[str]) -> str:
        """What is wrong with the files of a step; each process checks its share."""
        found = checksums.faults(
            self._folder / str(step), items, jax.process_index(), jax.process_count()
        )
        own = (found[0] if found else "").encode()[:_FAULT_BYTES]
        padded = np.frombuffer(own.ljust(_FAULT_BYTES), np.uint8)
        rows = multihost_utils.process_allgather(padded)
        faults = [row.tobytes().decode("utf8", "replace").strip() for row in rows]
        return next(filter(None, faults), "")

    def _set_aside(self, steps: Collection[int]) -> None:
        """Moves damaged checkpoints away: their steps are going to be saved again."""
        if jax.process_index() == 0:
            folder = self._folder.parent / "damaged"
            folder.mkdir(parents=True, exist_ok=True)
            for step in steps:
                place = folder / str(step)
                while place.exists():
                    place = folder / f"{place.name}_again"
                (self._folder / str(step)).rename(place)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self.manager.reload()


def description(cfg: StageConfig, step: int) -> dict[str, Any]:
    """What stored weights say about themselves: version, stage (with encoder), step."""
    return {
        "schema_version": SCHEMA_VERSION,
        "written_by": {"imagen_jax": __version__, "jax": jax.__version__},
        "step": step,
        "stage": dataclasses.asdict(cfg),
    }


def described_stage(values: Mapping[str, Any], where: str) -> StageConfig:
    """The stage in a `description`; a `UserError` if this program cannot read it."""
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version}, this program reads "
            f"{SCHEMA_VERSION}: use the release that wrote it"
        )
    return config_lib.from_json(values.get("stage"), where)


def _train_item(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt": state.opt_state,
        "guard": state.guard,
    }


def _preservation(training: TrainingConfig):
    """Keeps the newest checkpoints, every N-th step, and the best ones."""
    policies = [checkpoint_managers.LatestN(training.keep_checkpoints)]
    if training.keep_every_steps:
        policies.append(checkpoint_managers.EveryNSteps(training.keep_every_steps))
    if training.keep_best_checkpoints:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=_metric(training),
                reverse=True,
                n=training.keep_best_checkpoints,
                keep_checkpoints_without_metrics=False,
            )
        )
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _metric(training: TrainingConfig):
    """A function of a checkpoint's metrics; NaN and a missing value are the worst."""
    name = training.best_metric
    return lambda metrics: np.nan_to_num(metrics.get(name, np.nan), nan=np.inf)
