"""Numbers of a run, in files: metrics.jsonl, tensorboard/, events.jsonl."""

import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping

import jax
from etils import epath

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
# A run that is killed loses as much of its logs as a bucket does not have yet.
_COPY_SECONDS = 60.0


class MetricWriter:
    """Appends to the logs of a workdir; only process 0 writes.

    An object of a bucket cannot be appended to: the logs of a gs:// workdir are kept in
    a temporary folder and copied, with every event and once a minute.

    TensorBoard files are written when the `tensorboardX` package is installed.
    """

    def __init__(self, workdir: str):
        self.active = jax.process_index() == 0
        self.folder = pathlib.Path(workdir)
        self.bucket = None
        self.tensorboard = None
        if not self.active:
            return
        if "://" in str(workdir):
            self.bucket = epath.Path(workdir)
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix="imagen-logs-"))
            self._fetch()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and a point on each TensorBoard curve."""
        self._append(METRICS, {"step": step, **values})
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        self._copy(_COPY_SECONDS)

    def image(self, step: int, name: str, picture) -> None:
        """A `[H, W, 3]` uint8 picture for TensorBoard."""
        if self.tensorboard:
            self.tensorboard.add_image(name, picture, step, dataformats="HWC")

    def event(self, kind: str, step: int, **details) -> None:
        """One line of events.jsonl: what happened, when (seconds since 1970)."""
        line = {"event": kind, "step": step, "seconds": time.time(), **details}
        self._append(EVENTS, line)
        self._copy(0.0)

    def close(self) -> None:
        """Flushes what is left."""
        if self.tensorboard:
            self.tensorboard.close()
        self._copy(0.0)
        if self.bucket:
            shutil.rmtree(self.folder)

    def _append(self, name: str, line: Mapping) -> None:
        if self.active:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _fetch(self) -> None:
        """What earlier runs have logged, to be appended to."""
        self.copied = {}
        self.copied_at = time.monotonic()
        for name in (METRICS, EVENTS):
            if (self.bucket / name).exists():
                content = (self.bucket / name).read_bytes()
                (self.folder / name).write_bytes(content)

    def _copy(self, interval: float) -> None:
        """Copies the files that have grown, if the last time is `interval` s ago."""
        if not self.bucket or time.monotonic() - self.copied_at < interval:
            return
        for path in sorted(self.folder.rglob("*")):
            size = path.stat().st_size
            if path.is_file() and self.copied.get(path) != size:
                place = self.bucket / path.relative_to(self.folder).as_posix()
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(path.read_bytes())
                self.copied[path] = size
        self.copied_at = time.monotonic()
