"""Tells where the time of a training went, restarts included.

python -m imagen_jax.goodput --workdir=DIR [--json=FILE]

Reads events.jsonl of the workdir, a folder or gs://BUCKET/FOLDER, also while it is
being trained. Goodput is the share of the wall time in which steps were done that
lasted; docs/goodput.md says what each bucket is.
"""

import dataclasses
from collections.abc import Iterator

from absl import flags
from etils import epath

from imagen_jax import cli
from imagen_jax.errors import UserError
from imagen_jax.training.goodput import BUCKETS, Report, goodput
from imagen_jax.training.metrics import EVENTS

# Of a line; the longest, of a start that passes over checkpoints, have some thousands.
_LINE_BYTES = 2**20


def read_goodput(workdir: str) -> Report:
    """What the events of a workdir add up to.

    Raises:
      UserError: when there are none.
    """
    path = epath.Path(workdir) / EVENTS
    # What has no length may be a pipe, and there might be no end of it.
    if not path.exists() or not path.stat().length:
        raise UserError(
            f"{workdir} has no {EVENTS}: give the --workdir of a "
            "`python -m imagen_jax.train` that has begun"
        )
    with path.open("rb") as file:
        report = goodput(_lines(file))
    if not report.runs:
        why = f": {report.faults[0]}" if report.faults else ""
        raise UserError(f"{path} tells of no event{why}")
    return report


def _lines(file) -> Iterator[str]:
    """Of a file; what follows in a line that is too long is one of its own."""
    while line := file.readline(_LINE_BYTES):
        yield line.decode(errors="replace")


def table(report: Report) -> str:
    """The report as lines of text."""
    wall = report.wall_seconds
    lines = [f"{'':12}{'seconds':>16}{'share':>10}"]
    for bucket in BUCKETS:
        seconds = report.seconds[bucket]
        share = seconds / wall if wall else 0.0
        name = bucket.replace("_", " ")
        lines.append(f"{name:12}{seconds:16,.1f}{share:10.1%}")
    lines.append(f"{'wall time':12}{wall:16,.1f}")
    lines += [
        "",
        f"goodput: {report.goodput:.1%}",
        f"steps done: {report.steps:,}, of these lost: {report.steps_lost:,}",
        f"started {report.runs} times, restarts: {report.runs - 1}",
        f"last event: {report.last_event!r:.40} at step {report.last_step:,}",
    ]
    lines += [f"note: {note}" for note in report.notes]
    if report.bad_lines:
        lines.append(f"passed over: {report.bad_lines} lines that cannot be used")
        lines += [f"  {fault}" for fault in report.faults]
    return "\n".join(lines)


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("workdir", None, "of a training, or gs://BUCKET/FOLDER")
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
