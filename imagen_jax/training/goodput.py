"""Where the time of all runs of a workdir went, by the lines of its events.jsonl."""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

# In the order of a report. Of the last two no line tells: between runs, and what is
# missing inside one.
BUCKETS = (
    "step",
    "lost",
    "compile",
    "input_wait",
    "checkpoint",
    "evaluation",
    "start",
    "down",
    "unknown",
)
_TOLD_OF = BUCKETS[:-2]
# NTP corrects a clock by up to 0.05 %; what is below a second is no jump.
_DRIFT, _JUMP_SECONDS = 1e-3, 1.0
# Of rounding, in sums of seconds since a machine was started.
_ROUNDING = 1e-3
# Far beyond any run, and sums of it are finite.
_LARGEST = 10**15
# Of bad lines and of notes so many are shown.
_SHOWN = 8


@dataclasses.dataclass
class Report:
    """Of all runs together.

    Attributes:
      seconds: by bucket, all of `BUCKETS`; their sum is the wall time.
      steps: that were done, the lost ones included.
      steps_lost: that were done and did not last.
      runs: how often the training was started.
      last_event, last_step: of the last line.
      notes: on clocks that jumped and runs without a beginning.
      bad_lines: how many lines were passed over.
      faults: of the first of them, what is wrong with each.
    """

    seconds: dict[str, float]
    steps: int = 0
    steps_lost: int = 0
    runs: int = 0
    last_event: str = ""
    last_step: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    bad_lines: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)

    @property
    def wall_seconds(self) -> float:
        """From the start of the first run to the last line."""
        return math.fsum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the wall time in which steps were done that lasted."""
        return self.seconds["step"] / self.wall_seconds if self.wall_seconds else 0.0


def goodput(lines: Iterable[str]) -> Report:
    """What the lines of an events.jsonl add up to.

    Inside a run durations are those of the monotonic clock. Between the last line of a
    run and the start of the next there is only the wall clock; a negative gap counts as
    0. After "done" there was nothing to do: that gap is none.

    Args:
      lines: of the file; what cannot be used is passed over, counted and named.
    """
    ledger = _Ledger()
    report = ledger.report
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            ledger.add(_parse(text), number)
        except _BadLine as bad:
            report.bad_lines += 1
            if len(report.faults) < _SHOWN:
                report.faults.append(f"line {number} {bad}")
    return report


class _BadLine(ValueError):
    """Says what it does wrong."""


@dataclasses.dataclass
class _Line:
    event: str
    step: int
    seconds: float
    monotonic: float
    spent: dict[str, float]
    to: int

    @property
    def all_spent(self) -> float:
        return math.fsum(self.spent.values())


@dataclasses.dataclass
class _Stretch:
    """Steps that count until they are lost, and what they took."""

    begun: int
    end: int
    seconds: float


class _Ledger:
    def __init__(self):
        self.report = Report(dict.fromkeys(BUCKETS, 0.0))
        self.before: _Line | None = None
        self.lasting: list[_Stretch] = []
        self.position = 0

    def add(self, line: _Line, number: int) -> None:
        """The next line; raises `_BadLine` and changes nothing if it cannot be."""
        seconds = self.report.seconds
        if self._begins(line):
            if line.event != "start":
                self._note(f"line {number}: the start of its run is missing")
            self._gap(line, number)
            self._lose(line.step)
            self.report.runs += 1
            self.position = line.step
        else:
            self._passed(line, number)
        for bucket, spent in line.spent.items():
            seconds[bucket] += spent
        if line.event == "budget_spent":
            self._stand_still(line.step)
        self._go_on(line)
        if line.event == "rollback":
            self._lose(line.to)
        self.before = line
        self.report.last_event, self.report.last_step = line.event, line.step

    def _begins(self, line: _Line) -> bool:
        if line.event == "start" or self.before is None:
            return True
        goes_back = line.step < self.position
        # The devices stand still, or have not told of their last step yet.
        goes_back &= line.event not in ("budget_spent", "rollback", "steps")
        return goes_back or line.monotonic < self.before.monotonic

    def _gap(self, line: _Line, number: int) -> None:
        """Between two runs."""
        if self.before is None or self.before.event == "done":
            return
        gap = line.seconds - line.all_spent - self.before.seconds
        if gap < -_JUMP_SECONDS:
            self._note(
                f"line {number}: by the wall clock the run begins {-gap:,.1f} s before "
                "the end of the one before; the time between them counts as 0"
            )
        self.report.seconds["down"] += max(0.0, gap)

    def _passed(self, line: _Line, number: int) -> None:
        """Inside a run."""
        passed = line.monotonic - self.before.monotonic
        unknown = passed - line.all_spent
        if unknown < -_ROUNDING:
            raise _BadLine(f"spends {line.all_spent:.6g} s of {passed:.6g}")
        self.report.seconds["unknown"] += max(0.0, unknown)
        jump = line.seconds - self.before.seconds - passed
        if abs(jump) > max(_JUMP_SECONDS, _DRIFT * passed):
            self._note(
                f"line {number}: the wall clock jumped by {jump:+,.1f} s; durations "
                "inside a run are another clock's"
            )

    def _go_on(self, line: _Line) -> None:
        begun, self.position = self.position, max(self.position, line.step)
        self.report.steps += self.position - begun
        own = _Stretch(begun, self.position, line.spent.get("step", 0.0))
        if own.begun == own.end and line.event in ("checkpoint", "stop", "done"):
            # What was waited for before saving is part of what is saved.
            if self.lasting and self.lasting[-1].end == own.end:
                self.lasting[-1].seconds += own.seconds
                return
        self.lasting.append(own)

    def _stand_still(self, step: int) -> None:
        """What the devices were handed after the step were no steps."""
        for stretch in self.lasting:
            stretch.begun = min(stretch.begun, step)
            stretch.end = min(stretch.end, step)
        self.report.steps -= max(0, self.position - step)
        self.position = min(self.position, step)

    def _lose(self, step: int) -> None:
        """All steps after this one."""
        lost = 0.0
        while self.lasting and self.lasting[-1].begun >= step:
            last = self.lasting.pop()
            lost += last.seconds
            self.report.steps_lost += last.end - last.begun
        if self.lasting and self.lasting[-1].end > step:
            last = self.lasting[-1]
            cut = last.seconds * (last.end - step) / (last.end - last.begun)
            lost += cut
            self.report.steps_lost += last.end - step
            last.end, last.seconds = step, last.seconds - cut
        seconds = self.report.seconds
        seconds["step"] = max(0.0, seconds["step"] - lost)
        seconds["lost"] += lost

    def _note(self, text: str) -> None:
        if len(self.report.notes) < _SHOWN:
            self.report.notes.append(text)


def _parse(text: str) -> _Line:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise _BadLine(f"is no JSON: {text.strip()!r:.40}") from None
    if not isinstance(found, dict):
        raise _BadLine("is no event")
    event = found.get("event")
    if not isinstance(event, str):
        raise _BadLine("has no event")
    spent = found.get("spent")
    if not isinstance(spent, dict) or not set(spent) <= set(_TOLD_OF):
        raise _BadLine("has no spent seconds by bucket")
    return _Line(
        event=event,
        step=_number(found, "step", int),
        seconds=_number(found, "seconds"),
        monotonic=_number(found, "monotonic"),
        spent={bucket: _number(spent, bucket) for bucket in spent},
        to=_number(found, "to", int) if event == "rollback" else 0,
    )


def _number(found: dict[str, Any], name: str, kind=(int, float)):
    value = found.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _BadLine(f"has no {name}")
    if not 0 <= value <= _LARGEST:
        raise _BadLine(f"has a {name} of {value!s:.20}")
    return value
