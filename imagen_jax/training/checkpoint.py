"""Checkpoints: asynchronous, atomic, and knowing what they are.

A step's folder has five items: `ema` (all that sampling needs), `train` (the rest of
the state), `config` (the resolved stage), `iterator` (bytes of the data source that
this file does not understand, one entry per process) and the checksums of all.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from imagen_jax import __version__
from imagen_jax import config as config_lib
from imagen_jax.barrier import wait_for_all
from imagen_jax.config import StageConfig, TrainingConfig
from imagen_jax.errors import UserError
from imagen_jax.training import checksums
from imagen_jax.training.copying import copied, fits_twice
from imagen_jax.training.state import TrainState, abstract_state

SCHEMA_VERSION = 2

# What the two uses of a checkpoint read, and so what must be whole.
RESUMED = ("config", "ema", "iterator", "train")
SAMPLED = ("config", "ema")


class Checkpointer:
    """The `checkpoints` folder of one training workdir.

    Attributes:
      damaged: of the steps that were passed over, what is wrong with each.
    """

    def __init__(self, workdir: str, training: TrainingConfig | None = None):
        """Opens (and makes, when `training` is given) `workdir/checkpoints`.

        Args:
          workdir: of a training run, local or gs://.
          training: which checkpoints stay; None to read only.
        """
        self.workdir = workdir
        self.damaged: dict[int, str] = {}
        self._whole: set[tuple[int, Sequence[str]]] = set()
        self._root = epath.Path(workdir).expanduser().resolve()
        self._training = training
        options = ocp.CheckpointManagerOptions(create=False, read_only=True)
        if training:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_preservation(training),
                # What killed processes have not finished.
                cleanup_tmp_directories=True,
                # Else, where none can be made, all that waits for a folder does so for
                # ten minutes, Python's end too.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                # Without it Orbax does not keep metrics.
                best_fn=_metric(training) if training.keep_best_checkpoints else None,
            )
        self.manager = ocp.CheckpointManager(self._folder, options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._handed: concurrent.futures.Future | None = None

    @property
    def _folder(self) -> epath.Path:
        return self._root / "checkpoints"

    def save(
        self,
        state: TrainState,
        cfg: StageConfig,
        iterator: bytes,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing `state`; returns once it may be donated.

        Orbax takes longer than a short step to be handed a thousand arrays, so where
        there is room the devices copy the state, and a thread hands over the copy. Of
        several processes each hands it over itself: Orbax has the devices exchange
        something, which all must do in the order of their steps.

        Args:
          state: after its step.
          cfg: of the stage.
          iterator: where this process's data source stands.
          metrics: numbers of this state, by which the best are kept.
        """
        step = int(state.step)
        self._settle()
        if step in self.manager.all_steps():
            return
        apart = jax.process_count() == 1 and fits_twice(state)
        if apart:
            state = copied(state)
        train = {
            "step": state.step,
            "params": state.params,
            "opt": state.opt_state,
            "guard": state.guard,
        }
        positions = {
            str(process): base64.b64encode(position).decode()
            for process, position in enumerate(_gather(iterator))
        }
        items = {
            "ema": ocp.args.StandardSave(state.ema),
            "train": ocp.args.StandardSave(train),
            "config": ocp.args.JsonSave(description(cfg, step)),
            "iterator": ocp.args.JsonSave(positions),
            checksums.ITEM: checksums.Checksums(),
        }
        args = ocp.args.Composite(**items)
        save = functools.partial(self.manager.save, step, args=args, metrics=metrics)
        if apart:
            self._handed = self._thread.submit(save)
        else:
            save()

    def latest_step(self) -> int | None:
        """The newest complete step, whole or damaged; None when there is none."""
        self._settle()
        return self.manager.latest_step()

    def newest(self, items: Sequence[str] = RESUMED) -> int | None:
        """The newest step that is whole, None when nothing has been saved.

        Each damaged one that is newer is named on stderr; when checkpoints are going to
        be written here, it is moved to `workdir/damaged`. All processes call this.

        Args:
          items: that are going to be read.

        Raises:
          UserError: when all are damaged, or the newest is of another version.
        """
        self.wait()
        steps = sorted(self.manager.all_steps(), reverse=True)
        found = []
        for step in steps:
            faults = [] if (step, items) in self._whole else self._faults(step, items)
            if not faults:
                self._whole.add((step, items))
                if found and self._training:
                    self._set_aside(found)
                return step
            more = f" (and {len(faults) - 1} more)" if faults[1:] else ""
            self.damaged[step] = faults[0] + more
            found.append(step)
            older = [s for s in steps if s < step]
            if older and jax.process_index() == 0:
                print(
                    f"warning: checkpoint {step} of {self.workdir} is damaged: "
                    f"{self.damaged[step]}; it is passed over for {older[0]}",
                    file=sys.stderr,
                )
        if not found:
            return None
        lines = "".join(f"\n  {step}: {self.damaged[step]}" for step in found)
        raise UserError(
            f"no checkpoint of {self.workdir} is whole:{lines}\nCopy one of them again "
            "from where there is a copy, or give a new --workdir to start over (with "
            "--config.training.init_from, from other weights)"
        )

    def restore(self, cfg: StageConfig, mesh: Mesh) -> tuple[TrainState, bytes]:
        """The newest whole state, placed on `mesh`, and this process's iterator bytes.

        Raises:
          UserError: as `newest`, and when there is none.
        """
        step = self._required(RESUMED)
        like = abstract_state(cfg, mesh)
        train = {
            "step": like.step,
            "params": like.params,
            "opt": like.opt_state,
            "guard": like.guard,
        }
        with _readable(f"the checkpoint {step} of {self.workdir}"):
            found = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardRestore(like.ema),
                    train=ocp.args.StandardRestore(train),
                    iterator=ocp.args.JsonRestore(),
                ),
            )
            position = self._position(step, found.iterator)
        state = TrainState(
            step=found.train["step"],
            params=found.train["params"],
            ema=found.ema,
            opt_state=found.train["opt"],
            guard=found.train["guard"],
        )
        return state, position

    def stage(self, step: int | None = None) -> StageConfig:
        """The resolved config that a checkpoint (default: the newest) was trained with.

        Raises:
          UserError: as `newest`, and when there is none.
        """
        step = self._required(SAMPLED) if step is None else step
        where = f"the config of checkpoint {step} of {self.workdir}"
        with _readable(where):
            text = json.dumps(self._description(step)["stage"])
        return config_lib.from_json(text, where)

    def ema(self, like, step: int):
        """The averaged parameters at a saved step, as the abstract arrays of `like`."""
        with _readable(f"the checkpoint {step} of {self.workdir}"):
            found = self.manager.restore(
                step, args=ocp.args.Composite(ema=ocp.args.StandardRestore(like))
            )
        return found.ema

    def wait(self) -> None:
        """Waits until the last save is complete."""
        self._settle()
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and frees the folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self.manager.close()

    def _settle(self) -> None:
        """Waits until Orbax has what it is to write; raises what it raised."""
        if self._handed is not None:
            handed, self._handed = self._handed, None
            handed.result()

    def _required(self, items: Sequence[str]) -> int:
        step = self.newest(items)
        if step is None:
            raise UserError(
                f"{self.workdir} has no complete checkpoint: train this stage first"
            )
        return step

    def _position(self, step: int, saved: Mapping[str, str]) -> bytes:
        """This process's iterator bytes; on another number of them, those of all."""
        count = jax.process_count()
        if len(saved) == count:
            return base64.b64decode(saved[str(jax.process_index())])
        if len(set(saved.values())) == 1:
            return base64.b64decode(saved["0"])
        raise UserError(
            f"the checkpoint {step} of {self.workdir} was written by {len(saved)} "
            f"processes whose data stood at different places, there are {count} now: "
            f"start {len(saved)}"
        )

    def _description(self, step: int) -> dict:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return self.manager.restore(step, args=args).config

    def _faults(self, step: int, items: Sequence[str]) -> list[str]:
        """What is wrong with the files of a step, as all processes together find it."""
        mine = checksums.faults(
            self._folder / str(step), items, jax.process_index(), jax.process_count()
        )
        everyones = [json.loads(each) for each in _gather(json.dumps(mine).encode())]
        faults = list(dict.fromkeys(fault for each in everyones for fault in each))
        if any(fault.startswith("config/") for fault in faults):
            return faults
        # A release that wrote no checksums is told from a file that went missing.
        try:
            file = self._folder / str(step) / "config/metadata"
            found = self._description(step) if file.stat().length else None
        except Exception:  # Whatever Orbax comes upon in a file that is damaged.
            found = None
        if isinstance(found, dict):
            version = found.get("schema_version")
            check_version(version, f"checkpoint {step} of {self.workdir}")
        return faults

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Out of the way of the same steps, which are going to be saved again."""
        if jax.process_index() == 0:
            folder = self._root / "damaged"
            folder.mkdir(parents=True, exist_ok=True)
            for step in steps:
                name, number = str(step), 1
                while (folder / name).exists():
                    number += 1
                    name = f"{step}_{number}"
                (self._folder / str(step)).rename(folder / name)
        wait_for_all("go on when damaged checkpoints are set aside")
        self.manager.reload()


def description(cfg: StageConfig, step: int) -> dict:
    """What weights on disk say of themselves: version, stage (with encoder), step."""
    return {
        "schema_version": SCHEMA_VERSION,
        "written_by": {"imagen_jax": __version__, "jax": jax.__version__},
        "step": step,
        "stage": dataclasses.asdict(cfg),
    }


def check_version(version, what: str) -> None:
    """Raises `UserError` unless this program reads that version of `description`."""
    if version != SCHEMA_VERSION:
        has = "no schema version"
        if version is not None:
            has = f"schema version {version!s:.40}"
        raise UserError(
            f"{what} has {has}, this program reads {SCHEMA_VERSION}: use the release "
            "that wrote it"
        )


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whoever wrote it may have given it checksums that are right."""
    try:
        yield
    except (UserError, OSError):
        raise
    # Orbax has no error of its own; JAX's are RuntimeErrors.
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{what} is not what this program writes of this stage ({reason}): use the "
            "release that wrote it, or copy it again"
        ) from None


def _preservation(training: TrainingConfig):
    """The newest, every so-manieth step, and the best."""
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
    """A function of a checkpoint's metrics; what was not finite is the worst."""

    def value(metrics: Mapping[str, float]) -> float:
        found = metrics.get(training.best_metric, math.inf)
        return found if math.isfinite(found) else math.inf

    return value


def _gather(mine: bytes) -> list[bytes]:
    """Every process's bytes."""
    if jax.process_count() == 1:
        return [mine]
    wait_for_all("exchange what a checkpoint needs")
    sizes = multihost_utils.process_allgather(np.asarray(len(mine)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
