"""What the loop tells of its steps: means of their metrics, and their rate."""

import itertools
import time

import jax
import numpy as np

from imagen_jax.config import StageConfig
from imagen_jax.diffusion.loss import LOGSNR_EDGES
from imagen_jax.training.metrics import MetricWriter

# Metrics of which a line has the mean of its steps.
MEANS = ("loss", "gradient_norm", "parameter_norm", "learning_rate")


class Log:
    """Averages metrics on the host without holding up the device.

    An interval is fetched when the next one has been handed to the device, so the
    queue never runs empty. Steps whose update was skipped are in no mean; `spent` gets
    the loss and gradient norm of the one that spent the budget.
    """

    def __init__(self, cfg: StageConfig, writer: MetricWriter):
        self.cfg, self.writer = cfg, writer
        self.open: list = []
        self.closed: tuple[int, list] | None = None
        self.clock: float | None = None
        self.unsaved: list = []
        self.counted = 0
        self.spent: dict[str, float] | None = None

    def restart_clock(self) -> None:
        """Leaves an interval that was not all training out of the rate."""
        self.clock = None

    def since_checkpoint(self) -> dict[str, float]:
        """The means over the steps since this was last called.

        It waits for the last of them, as copying the state off the device does.
        """
        if not self.cfg.training.keep_best_checkpoints:
            return {}
        pending = [*(self.closed[1] if self.closed else []), *self.open]
        rows = self.unsaved + jax.device_get(pending[self.counted :])
        self.unsaved, self.counted = [], len(pending)
        return _means([row for row in rows if not row["skipped"]])

    def add(self, step: int, metrics, bar) -> None:
        """Takes a step's metrics, still on the device; `bar` shows the loss."""
        self.open.append(metrics)
        if step % self.cfg.training.log_every_steps == 0:
            self._write(bar)
            self.closed, self.open = (step, self.open), []

    def flush(self, step: int, bar) -> None:
        """Writes what is left, up to `step`; waits for it."""
        self._write(bar)
        if self.open:
            self.closed, self.open = (step, self.open), []
            self._write(bar)

    def _write(self, bar) -> None:
        if self.closed is None or self.spent:
            return
        step, rows = self.closed
        self.closed = None
        rows = jax.device_get(rows)
        if self.cfg.training.keep_best_checkpoints:
            self.unsaved += rows[self.counted :]
            self.counted = max(0, self.counted - len(rows))
        standing = [row["budget_spent"] for row in rows]
        if any(standing):
            # After the one that spent the budget nothing was done.
            count = standing.index(True) + 1
            step, rows = step - len(rows) + count, rows[:count]
            self.spent = {n: float(rows[-1][n]) for n in ("loss", "gradient_norm")}
        done = [row for row in rows if not row["skipped"]]
        means = {"skipped_updates": int(rows[-1]["skipped_updates"]), **_means(done)}
        now = time.perf_counter()
        if self.clock is not None:
            rate = len(rows) / (now - self.clock)
            means["steps_per_second"] = rate
            means["images_per_second"] = rate * self.cfg.training.batch_size
        self.clock = now
        self.writer.scalars(step, means)
        shown = {"loss": f"{means['loss']:.4f}"} if done else {}
        if means["skipped_updates"]:
            shown["skipped"] = means["skipped_updates"]
        bar.set_postfix(shown, refresh=False)


def _means(rows) -> dict[str, float]:
    """Of some steps' metrics; a log-SNR bucket that nothing fell into has none."""
    if not rows:
        return {}
    means = {name: float(np.mean([row[name] for row in rows])) for name in MEANS}
    total = sum(row["loss_by_logsnr"]["sum"] for row in rows)
    count = sum(row["loss_by_logsnr"]["count"] for row in rows)
    buckets = zip(bucket_names(), total, count, strict=True)
    return means | {name: float(s / n) for name, s, n in buckets if n}


def bucket_names() -> list[str]:
    """Metrics' names of the ranges of log-SNR that the loss is split by."""
    edges = [f"{edge:g}" for edge in LOGSNR_EDGES]
    between = ["_to_".join(pair) for pair in itertools.pairwise(edges)]
    ranges = [f"to_{edges[0]}", *between, f"from_{edges[-1]}"]
    return [f"loss_by_logsnr/{name}" for name in ranges]
