"""The training loop, one for all stages."""

import contextlib
import faulthandler
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from imagen_jax import config as config_lib
from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig
from imagen_jax.errors import Stopped, UserError, did_you_mean, printable
from imagen_jax.files import read_json
from imagen_jax.sharding import check_batch_size
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.claim import FILE_NAME, Claim
from imagen_jax.training.heldout import (
    HELD_OUT,
    compile_heldout_loss,
    heldout_loss,
)
from imagen_jax.training.metrics import (
    IntervalMeans,
    MetricWriter,
    Stopwatch,
    bucket_names,
)
from imagen_jax.training.preview import Preview, save_preview
from imagen_jax.training.replay import Recovery
from imagen_jax.training.state import TrainState, abstract_state, create_state
from imagen_jax.training.step import compile_train_step
from imagen_jax.training.stopping import stopping
from imagen_jax.training.weights import open_weights

# What a resumed run may change: how long, how often, where; not what is learned.
_FREE = ("training.", "data.records", "data.max_damaged", "sampler.", "mesh.")
_FIXED = ("training.batch_size", "training.seed")
_CONFIG, _PARTIAL = "config.json", "config.partial"


def train(
    cfg: StageConfig,
    workdir: str,
    batches: Iterator[Batch],
    mesh: Mesh,
    preview: Callable[[], Preview] | None = None,
    stopwatch: Stopwatch | None = None,
    heldout: Callable[[], Iterable[Batch]] | None = None,
) -> TrainState:
    """Trains from where `first_state` starts; returns the state after the last step.

    Args:
      workdir: local or gs://; gets config.json, checkpoints/, metrics.jsonl,
        tensorboard/, samples/, index.html, events.jsonl, lock and, after bad numbers,
        bundles/.
      batches: yields global batches placed on `mesh`; `get_state() -> bytes` and
        `set_state(bytes)` tell and take its position. `iter` may begin to read.
      mesh: of all devices.
      preview: returns what is sampled as training goes. Like `iter(batches)` and
        `heldout`, it is called while the step is compiled.
      stopwatch: of this run, already running.
      heldout: returns examples that are not trained on, the same batches every time.

    Raises:
      UserError: for a workdir of another config or that cannot be written, a batch that
        does not divide, or too many skipped updates; and as `first_state`.
      Stopped: on SIGINT or SIGTERM, after saving.
    """
    check_batch_size(
        cfg.training.batch_size, mesh, "training.batch_size", cfg.training.microbatches
    )
    best, known = cfg.training.best_metric, ["loss", *bucket_names()]
    if heldout:
        known += [*HELD_OUT, *itertools.chain(*map(bucket_names, HELD_OUT))]
    if best not in known:
        raise UserError(
            f"config.training.best_metric is {best!r}; it takes one of {known}"
            f"{did_you_mean(best, known)}"
        )
    try:
        with contextlib.ExitStack() as stack:
            claim = stack.enter_context(contextlib.closing(claim_workdir(cfg, workdir)))
            writer = MetricWriter(workdir, stopwatch or Stopwatch(), cfg, claim)
            stack.enter_context(contextlib.closing(writer))
            checkpointer = Checkpointer(workdir, cfg.training)
            stack.enter_context(contextlib.closing(checkpointer))
            stack.callback(faulthandler.cancel_dump_traceback_later)
            return _run(cfg, batches, mesh, preview, heldout, checkpointer, writer)
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({' '.join(str(error).split())}):"
            " make room or repair it, and start the same command again"
        ) from None


def first_state(
    cfg: StageConfig,
    mesh: Mesh,
    checkpointer: Checkpointer,
    set_position: Callable[[bytes], None],
) -> tuple[TrainState, dict[str, Any], list[dict[str, Any]]]:
    """The state that a run goes on from, where it comes from, and its unlogged steps.

    It is the newest checkpoint, else `training.init_from`, else random. `set_position`
    takes the data source to where it stood at the checkpoint. Raises `UserError` when
    all checkpoints are damaged, or the named weights do not fit.
    """
    step = checkpointer.newest()
    if step is not None:
        state, position = checkpointer.restore(cfg, mesh, step)
        set_position(position)
        origin = {"source": "checkpoint"}
        if checkpointer.damaged:
            origin["damaged"] = {str(n): why for n, why in checkpointer.damaged.items()}
        return state, origin, checkpointer.unlogged(step)
    if not cfg.training.init_from:
        return create_state(cfg, mesh), {"source": "scratch"}, []
    weights = open_weights(cfg.training.init_from)
    weights.check_fit(cfg, "config.training.init_from")
    state = create_state(cfg, mesh)
    params = weights.load(abstract_state(cfg, mesh).ema)
    # Two copies: the step donates both.
    state = state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
    origin = {
        "source": weights.path,
        "source_step": weights.step,
        "source_differs": weights.differences(cfg, ("diffusion.", "text.")),
    }
    return state, origin, []


def claim_workdir(cfg: StageConfig, workdir: str) -> Claim:
    """Takes `workdir` for a run of `cfg`; all processes do it together.

    Raises `UserError` when another run is at work there, the folder holds checkpoints
    of another config or something else, or more steps would not learn.
    """
    _check_workdir(cfg, workdir)
    claim = Claim(workdir)
    if jax.process_index() == 0:
        path = epath.Path(workdir) / _CONFIG
        partial = path.with_name(_PARTIAL)
        partial.write_text(config_lib.to_json(cfg))
        partial.replace(path)
    return claim


def _check_workdir(cfg: StageConfig, workdir: str) -> None:
    folder = epath.Path(workdir)
    path = folder / _CONFIG
    if not path.exists():
        names = {each.name for each in folder.iterdir()} if folder.exists() else set()
        if names - {_PARTIAL, FILE_NAME}:
            raise UserError(
                f"{workdir} is not empty and holds no config.json: give another "
                "--workdir"
            )
        return
    old = config_lib.from_json(read_json(path, "the config of a run"), str(path))
    saved = [each.name for each in (folder / "checkpoints").glob("*")]
    step = max([int(name) for name in saved if name.isdigit()], default=-1)
    if step < 0:
        return  # A run that has saved nothing is none to go on with.
    end, last = cfg.optimizer.decay_steps, cfg.training.steps
    if old.optimizer.decay_steps == end and old.training.steps <= end <= step < last:
        raise UserError(
            f"{workdir} is at step {step}, and its learning rate is 0 from step {end} "
            f"on: for training.steps={last} set config.optimizer.decay_steps=0, which "
            "is the last step"
        )
    ends = [c.optimizer.decay_steps in (0, c.training.steps) for c in (old, cfg)]
    # A decay that ends with the training stretches with it.
    free = (*_FREE, *(("optimizer.decay_steps",) if all(ends) else ()))
    lines = [
        line
        for line in config_lib.difference(old, cfg)
        if line.startswith(_FIXED) or not line.startswith(free)
    ]
    if lines:
        raise UserError(
            f"{workdir} holds a run of another config: give a new --workdir, or the "
            f"old values (there -> here): {', '.join(lines)}"
        )


def _run(cfg, batches, mesh, preview, heldout, checkpointer, writer):
    """The steps from `first_state` on, with all that is done between them."""
    training, stopwatch = cfg.training, writer.stopwatch
    workdir = checkpointer.workdir
    state, origin, unlogged = first_state(cfg, mesh, checkpointer, batches.set_state)
    step = first = int(state.step)
    last = training.steps
    writer.begin(first - len(unlogged))
    writer.event("start", first, devices=jax.device_count(), **origin)
    bar = tqdm(
        total=last,
        initial=first,
        desc=f"train {printable(cfg.name)}",
        unit="step",
        mininterval=1.0,
        disable=jax.process_index() != 0,
    )
    recovery = Recovery(cfg, batches, mesh, checkpointer, writer)
    means = IntervalMeans(cfg, writer, bar, unlogged)
    loss, previewed, measure = None, False, None
    heldout_every = training.heldout_every_steps or training.checkpoint_every_steps

    def open_data() -> None:
        if preview:
            preview()
        iter(batches)
        if heldout:
            heldout()

    stopwatch.switch("step")
    with bar, stopping() as stops_after:
        if step < last:
            with stopwatch.bucket("compile"):
                step_fn = compile_train_step(cfg, mesh, open_data)
        while step < last:
            step += 1
            # The first one waits for the first records, which may take long.
            if training.hang_seconds and loss is not None:
                faulthandler.dump_traceback_later(
                    training.hang_seconds, file=sys.__stderr__
                )
            recovery.note(step)
            with stopwatch.bucket("input_wait", running=loss):
                batch = next(batches)
            with stopwatch.bucket("compile" if loss is None else "step"):
                state, metrics = step_fn(state, batch)
            if loss is None:
                writer.event("compile", first)
                bar.unpause()
            loss = metrics["loss"]
            bar.update()
            means.add(step, metrics)

            saves = step % training.checkpoint_every_steps == 0 or step == last
            samples = (
                preview is not None
                and training.sample_every_steps
                and (step % training.sample_every_steps == 0 or step == last)
            )
            measures = heldout and (step % heldout_every == 0 or step == last)
            stops = stops_after(step)
            if saves or samples or stops or measures:
                means.fetch(step)
            faulthandler.cancel_dump_traceback_later()
            if means.spent:
                with stopwatch.bucket("lost"):
                    state = recovery.recover(state, means.spent)
                means = IntervalMeans(cfg, writer, bar)
                step = int(state.step)
                bar.update(step - bar.n)
                saves, samples, measures = step == last, False, False
            if measures:
                bucket = "evaluation" if measure else "compile"
                with stopwatch.bucket(bucket), means.pause():
                    measure = measure or compile_heldout_loss(cfg, mesh)
                    means.add_heldout(heldout_loss(measure, state, heldout()))
            if saves or stops:
                unlogged = list(means.unlogged)
                if step == last:
                    means.flush(step)
                with stopwatch.bucket("checkpoint"):
                    writer.claim.check()
                    position, best = batches.get_state(), means.since_checkpoint()
                    checkpointer.save(state, cfg, position, best, unlogged)
                writer.event("checkpoint", step)
            if samples:
                # The first preview compiles the sampler.
                bucket = "evaluation" if previewed else "compile"
                with stopwatch.bucket(bucket), means.pause():
                    save_preview(cfg, workdir, state, preview(), mesh, writer)
                writer.event("evaluation", step)
                previewed = True
            if stops or step == last:
                with stopwatch.bucket("checkpoint"):
                    checkpointer.wait()
            if stops:
                writer.event("stop", step)
                raise Stopped(
                    f"stopped on a signal at step {step}, saved in {workdir}: the same "
                    "command goes on from there"
                )
        means.flush(step)
    writer.event("done", last)
    return state
