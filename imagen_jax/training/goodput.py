"""The sums of an events.jsonl: where the time of a run went."""

import dataclasses
import json
import math
from collections.abc import Iterable

# In the order of the report; "down" is the time between two runs.
BUCKETS = (
    *("step", "lost", "compile", "input_wait", "checkpoint", "evaluation", "start"),
    "down",
)


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
