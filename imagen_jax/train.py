"""Trains one stage of a cascade; run again, it resumes.

python -m imagen_jax.train --config=configs/tiny.py:base --workdir=DIR \
    --config.data.records=RECORDS --config.optimizer.learning_rate=3e-4

The workdir, a folder or gs://BUCKET/FOLDER, gets config.json, checkpoints/,
metrics.jsonl, tensorboard/, samples/, events.jsonl and index.html, a page to keep open
in a browser. Ctrl-C saves and leaves with status 3. A run that stops for bad numbers
leaves a bundle, whose step

python -m imagen_jax.train --replay=DIR/bundles/STEP

does again on one device, and tells where numbers go bad. With --distributed the same
command is started once on each host of a TPU slice or for each task of a Slurm job (see
launch/README.md).
"""

import jax
from absl import flags
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.api.run import next_command, resolve, train_stage
from imagen_jax.errors import UserError, printable
from imagen_jax.training.replay import print_replay


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    config_flags.DEFINE_config_file("config", None, "FILE.py[:variant]")
    flags.DEFINE_string("workdir", None, "folder of this run, or gs://BUCKET/FOLDER")
    flags.DEFINE_bool("distributed", False, "one process of a TPU slice or Slurm job")
    flags.DEFINE_integer(
        "start_timeout_seconds", 120, "wait for the other processes", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds", 100, "without a sign of life: lost", lower_bound=1
    )
    flags.DEFINE_string("replay", None, "a bundle, WORKDIR/bundles/STEP; alone")

    flags.register_multi_flags_validator(
        ["config", "workdir", "replay"],
        lambda values: (
            {name for name, value in values.items() if value is not None}
            in ({"config", "workdir"}, {"replay"})
        ),
        message="give --config and --workdir, or --replay alone",
    )


def main() -> None:
    """Trains what the flags ask for, or replays a bundle."""
    args = flags.FLAGS
    if args.replay is not None:
        print_replay(args.replay)
        return
    if args.distributed:
        join(args.start_timeout_seconds, args.heartbeat_timeout_seconds)
        # Orbax's own flag: its barriers then end after 300 s instead of never.
        args.experimental_orbax_use_distributed_barrier = True
    cfg = resolve(cli.config_values())
    train_stage(cfg, args.workdir)
    if jax.process_index() == 0:
        made = "checkpoints/, samples/ and index.html"
        print(f"done: {made} are in {printable(args.workdir)}. Next, for example:")
        print(printable(next_command(cfg, args.workdir)))


def join(start_seconds: int, heartbeat_seconds: int) -> None:
    """Joins the processes that a TPU slice, GKE or Slurm has started.

    When one does not come in time, or gives no sign of life for so long, JAX ends all
    others with status 134, and names it where it can.
    """
    print(f"waiting for the other processes, at most {start_seconds} s", flush=True)
    try:
        jax.distributed.initialize(
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError:
        raise UserError(
            "--distributed: JAX finds no other processes, as TPU VMs, GKE and Slurm "
            "start them (launch/README.md); on one host leave --distributed out"
        ) from None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
