"""Where the time of a workdir's runs went: measured, and summed up over restarts."""

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

EVENTS = "events.jsonl"
# In the order of the report; "down" is the time between two runs.
BUCKETS = (
    *("step", "lost", "compile", "input_wait", "checkpoint", "evaluation", "start"),
    "down",
)


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
        """Puts what happens inside into the bucket `name`.

        Args:
          name: one of `BUCKETS`.
          running: a result of the last step; if it is not ready at the end, the devices
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


@dataclasses.dataclass
class Report:
    """All runs of a workdir."""

    seconds: dict[str, float]  # in each of `BUCKETS`; together the wall time
    steps: int = 0  # done, including those that were lost
    steps_lost: int = 0  # thrown away by a restart or a rollback
    runs: int = 0  # how often the training was started
    last_event: str = ""
    last_step: int = 0
    bad_lines: int = 0  # that cannot be read and were passed over

    @property
    def wall_seconds(self) -> float:
        """Seconds from the start of the first run to the last line."""
        return math.fsum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the wall time in which steps were done that lasted."""
        return self.seconds["step"] / self.wall_seconds if self.wall_seconds else 0.0


def goodput(lines: Iterable[str]) -> Report:
    """Sums up the lines of an events.jsonl.

    Durations are those of the monotonic clock, except between two runs, where there is
    only the wall clock. After "done" there was nothing to do: that time does not count.
    """
    report = Report(dict.fromkeys(BUCKETS, 0.0))
    lasting: list[tuple[int, int, float]] = []  # from step, to step, in seconds
    position, ended = 0, None  # step and time of the line before

    def lose(after: int) -> None:
        # Each checkpoint has a line, so that no entry begins before it and ends after.
        while lasting and lasting[-1][0] >= after:
            begin, end, seconds = lasting.pop()
            report.seconds["step"] -= seconds
            report.seconds["lost"] += seconds
            report.steps_lost += end - begin

    for text in filter(str.strip, lines):
        try:
            line = json.loads(text)
            event, step = line["event"], int(line["step"])
            spent = {bucket: float(line["spent"].get(bucket, 0)) for bucket in BUCKETS}
            now, back_to = float(line["seconds"]), int(line.get("to", 0))
        except (ValueError, TypeError, KeyError, AttributeError):
            report.bad_lines += 1
            continue
        if event == "start":
            report.runs += 1
            if ended is not None and report.last_event != "done":
                gap = now - sum(spent.values()) - ended
                report.seconds["down"] += max(0.0, gap)
            lose(step)
            position = step
        for bucket, seconds in spent.items():
            report.seconds[bucket] += seconds
        lasting.append((position, max(position, step), spent["step"]))
        report.steps += max(0, step - position)
        position, ended = max(position, step), now
        if event == "rollback":
            lose(back_to)
        report.last_event, report.last_step = event, step
    return report
