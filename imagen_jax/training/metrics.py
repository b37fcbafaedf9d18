"""Metrics, events and times of a run: metrics.jsonl, tensorboard/, events.jsonl."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from imagen_jax.config import StageConfig
from imagen_jax.diffusion.loss import LOGSNR_EDGES
from imagen_jax.files import write_text
from imagen_jax.training.claim import Claim
from imagen_jax.training.page import page

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
EVALUATIONS = "evaluations.jsonl"
PREVIEWS = "samples"
PAGE = "index.html"
_SHOWN = 2  # previews on the page
# Metrics averaged over the steps of a line.
MEANS = ("loss", "gradient_norm", "parameter_norm", "learning_rate")
# Files in a bucket are replaced as a whole, TensorBoard's are buffered; a kill loses at
# most this much of them.
_FLUSH_SECONDS = 60.0


class Stopwatch:
    """Puts every second of a run, from its beginning, into one bucket."""

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        """Starts in the bucket "start"; `wall`, between runs only, may jump."""
        self._monotonic, self._wall = monotonic, wall
        self._bucket, self._since = "start", monotonic()
        self._spent: collections.Counter[str] = collections.Counter()

    def switch(self, bucket: str) -> str:
        """What comes now is in `bucket`; returns the one before."""
        now = self._monotonic()
        self._spent[self._bucket] += now - self._since
        before, self._bucket, self._since = self._bucket, bucket, now
        return before

    @contextlib.contextmanager
    def bucket(self, name: str, running: jax.Array | None = None) -> Iterator[None]:
        """Puts what happens inside into the bucket `name`, as docs/goodput.md has them.

        If `running`, a result of the last step, is not ready at the end, the devices
        were busy all the while and the time stays in the bucket from before.
        """
        before = self.switch(name)
        try:
            yield
        finally:
            if running is not None and not running.is_ready():
                self._bucket = before
            self.switch(before)

    def lap(self) -> dict[str, Any]:
        """Values of an event: both clocks, and the seconds by bucket since the last."""
        self.switch(self._bucket)
        spent, self._spent = self._spent, collections.Counter()
        # A Counter's + drops what is zero.
        return {"seconds": self._wall(), "monotonic": self._since, "spent": +spent}


class MetricWriter:
    """Appends to the logs of a workdir; only process 0 writes.

    Files in a bucket cannot be appended to: those of a gs:// workdir are kept in a
    temporary folder, and copied at every event ("steps": at most once a minute).
    """

    def __init__(
        self,
        workdir: str,
        stopwatch: Stopwatch,
        cfg: StageConfig,
        claim: Claim | None = None,
    ):
        """Opens the logs of a run of `cfg`; `begin` comes before the first metrics.

        Once another run has taken `claim`, nothing is copied to a bucket. Weights &
        Biases is told too, if it is installed and WANDB_PROJECT is set.
        """
        self.stopwatch, self.claim, self.cfg = stopwatch, claim, cfg
        self.workdir, self._step, self._wandb = workdir, 0, None
        self.active = jax.process_index() == 0
        self.folder, self.bucket = pathlib.Path(workdir), None
        if not self.active:
            return
        # Imported only by the process that writes: the import is slow.
        from tensorboardX.event_file_writer import EventsWriter

        if "://" in workdir:
            self.bucket = epath.Path(workdir)
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix="imagen-logs-"))
        board = self.folder / "tensorboard"
        board.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVENTS):
            if self.bucket and (self.bucket / name).exists():
                (self.folder / name).write_bytes((self.bucket / name).read_bytes())
        # A kill may have cut the last event; `begin` drops the last line of metrics.
        path = self.folder / EVENTS
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            with path.open("a") as file:
                file.write("\n")
        # A SummaryWriter's thread dies of a full disk, and then all others wait for it.
        self._tensorboard = EventsWriter(str(board / "events"))
        self._flushed_at = time.monotonic()
        if os.environ.get("WANDB_PROJECT") and importlib.util.find_spec("wandb"):
            import wandb

            own = hashlib.sha256(os.path.abspath(workdir).encode()).hexdigest()[:16]
            options = {"id": own, "name": cfg.name, "resume": "allow"}
            self._wandb = wandb.init(config=dataclasses.asdict(cfg), **options)

    def begin(self, step: int) -> None:
        """Forgets metrics of steps after `step`, which are going to be done again."""
        if not self.active:
            return
        path = self.folder / METRICS
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if _step(line) <= step))
        # At this TensorBoard drops what it has of later steps.
        self._write_event(step + 1, session_log={"status": 1})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and a point on each TensorBoard curve."""
        if self.active:
            self._append(METRICS, {"step": step, **values})
            for name, value in values.items():
                self._show(step, "scalar", name, value)
            if self._wandb:
                self._wandb.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A `[H, W, 3]` uint8 image for TensorBoard."""
        if self.active:
            self._show(step, "image", name, image, dataformats="HWC")
            if self._wandb:
                import wandb

                self._wandb.log({name: wandb.Image(image)}, step=step)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """One line of events.jsonl: what happened, and where the time went.

        `step` is the last one that the devices have finished; docs/goodput.md lists the
        events.
        """
        lap, self._step = self.stopwatch.lap(), step
        if self.active:
            self._append(EVENTS, {"event": kind, "step": step, **lap, **details})
            self._flush(_FLUSH_SECONDS if kind == "steps" else 0.0)

    def close(self) -> None:
        """Writes what is left."""
        if self.active:
            self._flush()
            self._tensorboard.close()
            if self._wandb:
                self._wandb.finish()
        if self.bucket:
            shutil.rmtree(self.folder)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _show(self, step: int, kind: str, *values: Any, **options: Any) -> None:
        from tensorboardX import summary

        self._write_event(step, summary=getattr(summary, kind)(*values, **options))

    def _write_event(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(step=step, wall_time=time.time(), **what)
        self._tensorboard.write_event(event)

    def _flush(self, seconds: float = 0.0) -> None:
        """Writes what is buffered and the page, and to the bucket.

        Unless that was done `seconds` ago.
        """
        if time.monotonic() - self._flushed_at < seconds:
            return
        self._tensorboard.flush()
        text = draw_page(self.cfg, self.workdir, epath.Path(self.folder), self._step)
        write_text(self.folder / PAGE, text)
        taken = self.bucket and self.claim and self.claim.taken_by()
        files = self.folder.rglob("*") if self.bucket and not taken else ()
        for path in filter(pathlib.Path.is_file, files):
            place = self.bucket / path.relative_to(self.folder).as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
        self._flushed_at = time.monotonic()


def draw_page(cfg: StageConfig, workdir: str, logs: epath.Path, step: int) -> str:
    """The page of a run of `cfg` that is at `step`, whose newest lines are in `logs`.

    What `evaluate --watch` found is in the workdir, as the previews are.
    """
    folder = epath.Path(workdir)
    files = [logs / METRICS, logs / EVENTS, folder / EVALUATIONS]
    lines = [f.read_text().splitlines() if f.exists() else [] for f in files]
    previews = folder / PREVIEWS
    names = [p.name for p in previews.iterdir()] if previews.exists() else []
    # Those of later steps are of a run that was here before.
    names = sorted(n for n in names if n.partition(".")[0] <= f"{step:08d}")
    newest = [f"{PREVIEWS}/{name}" for name in names[: -1 - _SHOWN : -1]]
    metrics, events, evaluations = lines
    return page(cfg, metrics, events, newest, evaluations)


def _step(line: str) -> float:
    """The step of a line of metrics; infinity for what a kill has left of one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class IntervalMeans:
    """Writes the means of every `training.log_every_steps` steps.

    They are fetched when the step after them has been handed to the devices, so that
    these have work while the host writes. Skipped updates do not enter the means.
    """

    def __init__(
        self,
        cfg: StageConfig,
        writer: MetricWriter,
        bar: tqdm,
        unlogged: Sequence[Mapping[str, Any]] = (),
    ):
        """Starts with the `unlogged` steps of a checkpoint; `bar` shows the loss."""
        self.cfg, self.writer, self.bar = cfg, writer, bar
        # Steps without a line yet, on the host: a checkpoint takes them along, so that
        # the lines of a resumed run are those of a run that was not stopped.
        self.unlogged: list[Mapping[str, Any]] = list(unlogged)
        # "loss" and "gradient_norm" of the step that spent the budget, if one has.
        self.spent: dict[str, float] | None = None
        self._rows: list[Mapping[str, Any]] = []  # on the devices
        self._unsaved: list[Mapping[str, Any]] = []  # on the host, not in a checkpoint
        self._clock: float | None = None  # when the last line was written

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step that has been handed to the devices."""
        if (step - 1) % self.cfg.training.log_every_steps == 0:
            self.flush(step - 1)
        self._rows.append(metrics)

    def fetch(self, step: int) -> None:
        """Waits for the steps up to `step`; writes a line if one spent the budget."""
        rows, self._rows = jax.device_get(self._rows), []
        for number, row in enumerate(rows, step - len(rows) + 1):
            if self.spent:
                return  # The steps after that one changed nothing.
            if row["budget_spent"]:
                self.spent = {name: float(row[name]) for name in MEANS[:2]}
            if row["skipped"]:
                row = {name: row[name] for name in ("skipped", "skipped_updates")}
            row = jax.tree.map(lambda x: np.asarray(x).tolist(), row)
            self.unlogged.append(row)
            self._unsaved.append(row)
            if self.spent:
                self._write(number)

    def flush(self, step: int) -> None:
        """Writes the line of the steps up to `step`, once the devices have done it."""
        self.fetch(step)
        if self.unlogged and not self.spent:
            self._write(step)

    def add_heldout(self, values: Mapping[str, float]) -> None:
        """Takes the `heldout_loss` after the last fetched step; it has its own line."""
        self.unlogged[-1]["heldout"] = values

    def _write(self, step: int) -> None:
        rows, self.unlogged = self.unlogged, []
        for number, row in enumerate(rows, step - len(rows) + 1):
            if "heldout" in row:
                self.writer.scalars(number, row["heldout"])
        skipped = rows[-1]["skipped_updates"]
        line = {"skipped_updates": skipped, **_means(rows)}
        now = time.perf_counter()
        if self._clock is not None:
            rate = len(rows) / (now - self._clock)
            line["steps_per_second"] = rate
            line["images_per_second"] = rate * self.cfg.training.batch_size
        self._clock = now
        self.writer.scalars(step, line)
        self.writer.event("steps", step)
        shown = {"loss": line.get("loss")} | ({"skipped": skipped} if skipped else {})
        self.bar.set_postfix(shown, refresh=False)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens inside out of the rate of steps, and the time left."""
        began = time.perf_counter()
        yield
        self.bar.unpause()
        if self._clock is not None:
            self._clock += time.perf_counter() - began

    def since_checkpoint(self) -> dict[str, float]:
        """What is known since the last call, to choose the best checkpoint by.

        Means of the fetched steps, and the last held-out losses.
        """
        rows, self._unsaved = self._unsaved, []
        heldout = [row["heldout"] for row in rows if "heldout" in row]
        return _means(rows) | (heldout[-1] if heldout else {})


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of steps; a range of log-SNR that no example fell into has none."""
    rows = [row for row in rows if not row["skipped"]]
    if not rows:
        return {}
    means = {name: float(np.mean([row[name] for row in rows])) for name in MEANS}
    total, count = (
        np.sum([row["loss_by_logsnr"][name] for row in rows], axis=0)
        for name in ("sum", "count")
    )
    return means | by_range("loss_by_logsnr", total, count)


def by_range(name: str, total: np.ndarray, count: np.ndarray) -> dict[str, float]:
    """Means of what `diffusion.loss.loss_by_logsnr` has summed and counted."""
    ranges = zip(bucket_names(name), total, count, strict=True)
    return {own: float(s / n) for own, s, n in ranges if n}


def bucket_names(name: str = "loss_by_logsnr") -> list[str]:
    """Names of the mean losses in ranges of log-SNR, the lowest range first."""
    edges = [f"{edge:g}" for edge in LOGSNR_EDGES]
    between = ["_to_".join(pair) for pair in itertools.pairwise(edges)]
    ranges = [f"to_{edges[0]}", *between, f"from_{edges[-1]}"]
    return [f"{name}/{own}" for own in ranges]
