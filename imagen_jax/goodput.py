"""Tells where the time of a training run went, restarts included.

python -m imagen_jax.goodput --workdir=DIR [--json=FILE]

Reads events.jsonl of the workdir, a folder or gs://BUCKET/FOLDER, also while it is
being trained. Goodput is the share of the wall time in which steps were done that
lasted; docs/goodput.md says what each bucket is.
"""

import dataclasses
import json
import math
from collections.abc import Iterable

from absl import flags
from etils import epath

from imagen_jax import cli
from imagen_jax.errors import UserError
from imagen_jax.stores import check_store
from imagen_jax.training.metrics import EVENTS

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


def read_goodput(workdir: str) -> Report:
    """The sums of the events of a workdir; a `UserError` when there are none."""
    check_store(workdir)
    path = epath.Path(workdir) / EVENTS
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    report = goodput(text.splitlines())
    if not report.runs:
        raise UserError(
            f"{path} does not exist or tells of no run: give the --workdir of `train`"
        )
    return report


def table(report: Report) -> str:
    """The report as lines of text."""
    wall = report.wall_seconds
    lines = [f"{'':12}{'seconds':>16}{'share':>10}"]
    for bucket, seconds in report.seconds.items():
        share = seconds / wall if wall else 0.0
        lines.append(f"{bucket.replace('_', ' '):12}{seconds:16,.1f}{share:10.1%}")
    lines += [
        f"{'wall time':12}{wall:16,.1f}",
        "",
        f"goodput: {report.goodput:.1%}",
        f"steps done: {report.steps:,}, of these lost: {report.steps_lost:,}",
        f"started {report.runs} times, restarts: {report.runs - 1}",
        f"last event: {report.last_event!r} at step {report.last_step:,}",
    ]
    if report.bad_lines:
        lines.append(f"passed over: {report.bad_lines} lines that cannot be read")
    return "\n".join(lines)


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("workdir", None, "of a training run, or gs://BUCKET/FOLDER")
    flags.DEFINE_string("json", None, "also write the report to this file")
    flags.mark_flag_as_required("workdir")


def main() -> None:
    """Prints what the flags ask for."""
    args = flags.FLAGS
    cli.check_json(args.json)
    report = read_goodput(args.workdir)
    print(table(report))
    sums = {"goodput": report.goodput, "wall_seconds": report.wall_seconds}
    cli.write_json(args.json, sums | dataclasses.asdict(report))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
