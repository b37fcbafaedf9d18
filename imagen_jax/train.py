"""Trains one stage of a cascade; run again, it resumes.

python -m imagen_jax.train --config=configs/tiny.py:base --workdir=DIR \
    --config.data.records=RECORDS --config.optimizer.learning_rate=3e-4

The workdir, a folder or gs://BUCKET/FOLDER, gets config.json, checkpoints/,
metrics.jsonl, tensorboard/, samples/ and events.jsonl. Ctrl-C saves and leaves with
status 3. A run that stops for bad numbers leaves a bundle, whose step

python -m imagen_jax.train --replay=DIR/bundles/STEP

does again on one device, and tells where numbers go bad. With --distributed the same
command is started once on each host of a TPU slice or for each task of a Slurm job (see
launch/README.md).
"""

import math

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, processes
from imagen_jax.api.run import resolve, train_stage
from imagen_jax.training.replay import first_not_finite, replay

# To which the numbers of a replay agree: other devices sum in another order.
_SAME = 0.01
# Lines of each of its tables.
_SHOWN = 8


def print_replay(bundle: str) -> None:
    """Does the step of a bundle again, and prints what it shows.

    Raises:
      UserError: for a folder that is no bundle, or a damaged one.
    """
    done = replay(bundle)
    print(f"step {done.step}, done again on one device\n")
    print(f"{'':16}{'in the run':>16}{'here':>16}")
    same = True
    for name, was in done.recorded.items():
        now = done.here[name]
        print(f"{name.replace('_', ' '):16}{was:16.8g}{now:16.8g}")
        same &= (
            math.isclose(now, was, rel_tol=_SAME)
            if math.isfinite(was)
            else not math.isfinite(now)
        )
    print(f"\nthe numbers {'agree' if same else 'DO NOT AGREE'} (to {_SAME:.0%})")
    cause = first_not_finite(done.here)
    print(f"first not finite: {cause or 'nothing, all numbers are finite'}")
    examples = sorted(
        done.here["examples"],
        key=lambda e: e["loss"] if math.isfinite(e["loss"]) else math.inf,
        reverse=True,
    )
    print(f"\n{'largest losses':>16}{'example':>12}{'log-SNR':>12}{'text up to':>12}")
    for example in examples[:_SHOWN]:
        print(
            f"{example['loss']:16.6g}{example['id']:12d}"
            f"{example['logsnr']:12.4g}{example['text']:12.4g}"
        )
    for kind in ("parameters", "layers", "gradients"):
        # The largest that are finite, beside the first that is not.
        finite = {n: v for n, v in done.here[kind].items() if math.isfinite(v)}
        bad = len(done.here[kind]) - len(finite)
        print(f"\n{kind}: {bad} of {len(done.here[kind])} not finite; the largest are")
        for name in sorted(finite, key=finite.get, reverse=True)[:_SHOWN]:
            print(f"{finite[name]:16.6g}  {name}")


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    config_flags.DEFINE_config_file("config", None, "FILE.py[:variant]")
    flags.DEFINE_string("workdir", None, "folder of this run, or gs://BUCKET/FOLDER")
    flags.DEFINE_bool("distributed", False, "one process of a TPU slice or Slurm job")
    flags.DEFINE_integer(
        "start_timeout_seconds",
        600,
        "with --distributed: how long to wait for the other processes",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds",
        100,
        "with --distributed: after so long without a sign of life a process is lost",
        lower_bound=1,
    )
    flags.DEFINE_string("replay", None, "a bundle, WORKDIR/bundles/STEP; alone")

    def given(name):
        return flags.FLAGS[name].value is not None

    for name in ("config", "workdir"):
        flags.register_validator(
            name,
            lambda value: value is not None or given("replay"),
            message="give --config and --workdir, or --replay alone",
        )
    flags.register_validator(
        "replay",
        lambda value: value is None or not (given("config") or given("workdir")),
        message="its config is in the bundle: give neither --config nor --workdir",
    )


def main() -> None:
    """Trains what the flags ask for, or replays a bundle."""
    args = flags.FLAGS
    if args.replay is not None:
        print_replay(args.replay)
        return
    if args.distributed:
        processes.join(args.start_timeout_seconds, args.heartbeat_timeout_seconds)
        # Orbax's own flag: its barriers end after 300 s, and not never.
        args.experimental_orbax_use_distributed_barrier = True
    with processes.losses_named():
        train_stage(resolve(cli.config_values()), args.workdir)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
