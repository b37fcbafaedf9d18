"""Numbers of a run, in files: metrics.jsonl, tensorboard/, events.jsonl."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax


class MetricWriter:
    """Appends to the logs of a workdir; only process 0 writes.

    TensorBoard files are written when the `tensorboardX` package is installed.
    """

    def __init__(self, workdir: str):
        self.active = jax.process_index() == 0
        self.folder = Path(workdir)
        self.tensorboard = None
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                return
            self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and a point on each TensorBoard curve."""
        self._append("metrics.jsonl", {"step": step, **values})
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture) -> None:
        """A `[H, W, 3]` uint8 picture for TensorBoard."""
        if self.tensorboard:
            self.tensorboard.add_image(name, picture, step, dataformats="HWC")

    def event(self, kind: str, step: int, **details) -> None:
        """One line of events.jsonl: what happened, when (seconds since 1970)."""
        line = {"event": kind, "step": step, "seconds": time.time(), **details}
        self._append("events.jsonl", line)

    def close(self) -> None:
        """Flushes what is left."""
        if self.tensorboard:
            self.tensorboard.close()

    def _append(self, name: str, line: Mapping) -> None:
        if self.active:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(line) + "\n")
