"""The loop: one for all stages."""

import contextlib
import dataclasses
from typing import Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from imagen_jax import config as config_lib
from imagen_jax import images as pictures
from imagen_jax.batch import Batch, downsample
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.cascade import Stage, sample_cascade
from imagen_jax.errors import Stopped, UserError, did_you_mean
from imagen_jax.models import network
from imagen_jax.sharding import check_batch_size
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.initial_state import first_state
from imagen_jax.training.log import Log, bucket_names
from imagen_jax.training.metrics import MetricWriter
from imagen_jax.training.recovery import Recovery
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import compile_train_step
from imagen_jax.training.stopping import stopping
from imagen_jax.training.stopwatch import Stopwatch
from imagen_jax.training.watchdog import Watchdog

# What a resumed run may change: how long, how often, where; not what is learned.
_FREE = (
    "training.steps",
    "training.microbatches",
    "training.log_every_steps",
    "training.sample_every_steps",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.keep_every_steps",
    "training.keep_best_checkpoints",
    "training.best_metric",
    "training.init_from",
    "training.preview_images",
    "training.spike_factor",
    "training.skip_budget_steps",
    "training.on_spent_budget",
    "data.records",
    "sampler.",
    "mesh.",
)

# Of a config.json, far more than one has.
_CONFIG_BYTES = 2**20


class BatchIterator(Protocol):
    """What the loop needs of a data source."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> bytes:
        """Where the source stands; `set_state` takes it back."""

    def set_state(self, state: bytes) -> None:
        """Continues as if the batches before `state` had been taken."""


def check_workdir(cfg: StageConfig, workdir: str) -> None:
    """Claims `workdir` for `cfg`, or says why it cannot be.

    Every process looks, process 0 writes.

    Raises:
      UserError: when the folder holds a run of another config.
    """
    folder = epath.Path(workdir)
    path = folder / "config.json"
    partial = folder / "config.partial"
    if path.exists():
        # A pipe has no length, and reading it might not end.
        if not 0 < path.stat().length < _CONFIG_BYTES:
            raise UserError(f"{path} is not the config of a run: remove it")
        text = path.read_bytes().decode("utf8", "replace")
        old = config_lib.from_json(text, str(path))
        lines = [
            line
            for line in config_lib.difference(old, cfg)
            if not line.startswith(_FREE)
        ]
        if lines:
            raise UserError(
                f"{workdir} holds a run of another config; give a new --workdir, or "
                "the old values. It differs in (there -> here):\n  "
                + "\n  ".join(lines)
            )
    elif folder.exists() and any(p.name != partial.name for p in folder.iterdir()):
        raise UserError(
            f"{workdir} is not empty and holds no config.json: it is not a workdir of "
            "this program; give another --workdir"
        )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(config_lib.to_json(cfg))
        partial.replace(path)


def train(
    cfg: StageConfig,
    workdir: str,
    batches: BatchIterator,
    mesh: Mesh,
    preview: Batch | None = None,
    stopwatch: Stopwatch | None = None,
) -> TrainState:
    """Trains from the newest whole checkpoint of `workdir` to the last step.

    Without one it starts from `training.init_from`, or from scratch.

    Args:
      cfg: the stage, resolved.
      workdir: local or gs://; gets config.json, checkpoints/, metrics.jsonl,
        tensorboard/, samples/, events.jsonl and, with bad numbers, bundles/.
      batches: yields global batches placed on `mesh`.
      mesh: of all devices.
      preview: examples on the host that are sampled, over and over, as training
        goes; None for none.
      stopwatch: of this run, that runs already; by default one from now on.

    Returns:
      The last state.

    Raises:
      UserError: for a workdir of another config, a batch that does not divide, weights
        that do not fit, or checkpoints of which none is whole; and when more updates
        were skipped than the config allows; or a workdir that cannot be written.
      Stopped: on SIGINT, SIGTERM or a notice of maintenance, after saving.
    """
    check_batch_size(
        cfg.training.batch_size,
        mesh,
        "training.batch_size",
        cfg.training.microbatches,
    )
    stopwatch = stopwatch or Stopwatch()
    _check_best_metric(cfg)
    try:
        check_workdir(cfg, workdir)
        checkpointer = Checkpointer(workdir, cfg.training)
        writer = MetricWriter(workdir, stopwatch)
        try:
            state, origin = first_state(cfg, mesh, checkpointer, batches.set_state)
            writer.event("start", int(state.step), devices=jax.device_count(), **origin)
            return _run(
                cfg, workdir, batches, mesh, preview, state, checkpointer, writer
            )
        finally:
            stopwatch.close()
            checkpointer.close()
            writer.close()
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written: {error}\nIts checkpoints stay "
            "as they are. To go on from the newest, make room or repair what is wrong, "
            "and start the same command again"
        ) from None


def _run(cfg, workdir, batches, mesh, preview, state, checkpointer, writer):
    first = int(state.step)
    last = cfg.training.steps
    step_fn = compile_train_step(cfg, mesh)
    log, stopwatch = Log(cfg, writer), writer.stopwatch
    watchdog = Watchdog()
    recovery = Recovery(cfg, workdir, batches, mesh, checkpointer, writer)
    bar = tqdm(
        total=last,
        initial=first,
        desc=f"train {cfg.name}",
        unit="step",
        mininterval=1.0,
        disable=jax.process_index() != 0,
    )

    def save(state):
        with stopwatch.bucket("checkpoint"):
            position = batches.get_state()
            checkpointer.save(state, cfg, position, log.since_checkpoint())

    stopwatch.train_from(first, watchdog.step)
    with bar, contextlib.closing(watchdog), stopping() as stopped:
        step = first
        previews = 0
        while step < last:
            step += 1
            recovery.note(step)
            with stopwatch.bucket("input_wait"):
                batch = next(batches)
            # The first call compiles.
            with stopwatch.bucket("compile" if step == first + 1 else "step"):
                state, metrics = step_fn(state, batch)
            stopwatch.handed(step, metrics["loss"])
            if step == first + 1:
                writer.event("compile", first)
            bar.update()
            log.add(step, metrics, bar)
            if step % cfg.training.log_every_steps == 0:
                writer.event("steps", stopwatch.done)
            saves = step % cfg.training.checkpoint_every_steps == 0 or step == last
            every = cfg.training.sample_every_steps
            samples = preview is not None and every
            samples = samples and (step % every == 0 or step == last)
            stops = stopped(step)
            # Saving and sampling wait for the devices anyway.
            if log.spent or ((saves or samples or stops) and state.guard.spent):
                with stopwatch.bucket("lost"), watchdog.apart("recovery"):
                    log.flush(step, bar)
                    state = recovery.recover(state, log.spent)
                step, log = int(state.step), Log(cfg, writer)
                stopwatch.done = step
                bar.update(step - bar.n)
                saves, samples = step == last, False
            if saves:
                save(state)
                writer.event("checkpoint", step)
            if samples:
                # Its first call compiles.
                kind = "evaluation" if previews else "compile"
                with stopwatch.bucket(kind), watchdog.apart("evaluation"):
                    _preview(cfg, workdir, state, preview, mesh, step, writer)
                writer.event("evaluation", step)
                previews += 1
                log.restart_clock()
            if stops:
                save(state)
                log.flush(step, bar)
                with stopwatch.bucket("checkpoint"):
                    checkpointer.wait()
                writer.event("stop", step, why=stopped.why)
                raise Stopped(
                    f"stopped on {stopped.why} at step {step}, saved in {workdir}"
                )
        log.flush(last, bar)
        with stopwatch.bucket("checkpoint"):
            checkpointer.wait()
    writer.event("done", last)
    return state


def _check_best_metric(cfg: StageConfig) -> None:
    name, known = cfg.training.best_metric, ["loss", *bucket_names()]
    if name not in known:
        raise UserError(
            f"config.training.best_metric is {name!r}; it takes one of {known}"
            + did_you_mean(name, known)
        )


def _preview(cfg, workdir, state, preview, mesh, step, writer) -> None:
    """A grid of samples, and under each the picture that it was trained towards."""
    truth = preview.image
    lowres = None
    if cfg.lowres_size:
        lowres = downsample(truth, cfg.train_lowres_size)
    # A stage that trains on crops is shown at the size of its crops.
    cfg = dataclasses.replace(
        cfg,
        image_size=cfg.train_size,
        lowres_size=cfg.train_lowres_size,
        crop_size=0,
        sampler=dataclasses.replace(cfg.sampler, batch_size=len(preview.image)),
    )
    stage = Stage(params=state.ema, cfg=cfg, apply=network.apply)
    (made,), _ = sample_cascade(
        [stage],
        preview.text,
        preview.mask,
        np.arange(len(truth)),
        mesh,
        lowres,
    )
    if jax.process_index() == 0:
        both = np.concatenate([made, truth], axis=1)
        sheet = pictures.grid(both, min(8, len(both)))
        folder = epath.Path(workdir) / "samples"
        folder.mkdir(exist_ok=True)
        pictures.save(folder / f"{step:08d}.png", sheet)
        writer.image(step, "samples", sheet)
