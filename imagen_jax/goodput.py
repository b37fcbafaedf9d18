"""Tells where the time of a training run went, restarts included.

python -m imagen_jax.goodput --workdir=DIR [--json=FILE]

Reads events.jsonl of the workdir, a folder or gs://BUCKET/FOLDER, also while it is
being trained. Goodput is the share of the wall time in which steps were done that
lasted; docs/goodput.md says what each bucket is.
"""

import dataclasses

from absl import flags
from etils import epath

from imagen_jax import cli
from imagen_jax.errors import UserError
from imagen_jax.stores import check_store
from imagen_jax.training.goodput import Report, goodput
from imagen_jax.training.metrics import EVENTS


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
