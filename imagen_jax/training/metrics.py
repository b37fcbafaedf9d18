"""Numbers of a run, in files: metrics.jsonl, tensorboard/, events.jsonl."""

import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping

import jax
from etils import epath

from imagen_jax.training.stopwatch import Stopwatch

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

    def __init__(self, workdir: str, stopwatch: Stopwatch):
        self.stopwatch = stopwatch
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
        for name in (METRICS, EVENTS):
            _end_line(self.folder / name)
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
        """One line of events.jsonl: what happened, when, and where the time went.

        Args:
          kind: of event; docs/goodput.md lists them.
          step: that the devices have finished.
          details: more values of the line.
        """
        self._append(
            EVENTS, {"event": kind, "step": step, **self.stopwatch.lap(), **details}
        )
        # A bucket gets whole files: they are not sent with each of these lines.
        self._copy(_COPY_SECONDS if kind == "steps" else 0.0)

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


def _end_line(path: pathlib.Path) -> None:
    """Ends a line that a kill has cut, so that the next one is whole."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
