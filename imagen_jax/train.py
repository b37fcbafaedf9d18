"""Trains one stage of a cascade; run again, it resumes.

python -m imagen_jax.train --config=tiny:base --workdir=DIR \
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
from imagen_jax.errors import printable
from imagen_jax.training.replay import print_replay


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    config_flags.DEFINE_config_file("config", None, "NAME or FILE.py[:variant]")
    flags.DEFINE_string("workdir", None, "folder of this run, or gs://BUCKET/FOLDER")
    cli.define_distributed()
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
    cli.join()
    cfg = resolve(cli.config_values())
    train_stage(cfg, args.workdir)
    if jax.process_index() == 0:
        made = "checkpoints/, samples/ and index.html"
        print(f"done: {made} are in {printable(args.workdir)}. Next, for example:")
        print(printable(next_command(cfg, args.workdir)))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
