"""Measures a stage: what it weighs, how it compiles, how fast it trains.

python -m imagen_jax.benchmark --config=configs/sr256.py:tiny --what=train \
    [--json=FILE] [--seconds=20] [--config.training.batch_size=4]
python -m imagen_jax.benchmark --config=configs/base64.py --what=params
python -m imagen_jax.benchmark --config=configs/base64.py --what=compile \
    --topology=v4-512 --config.mesh.fsdp=16
python -m imagen_jax.benchmark --config=configs/tiny.py:base --what=sample \
    --config.sampler.name=dpmpp --config.sampler.steps=25

python -m imagen_jax.benchmark --config=configs/tiny.py:base --what=data \
    --config.data.records=RECORDS

"params" counts parameters per block, without making them. "compile" compiles a
training step for the devices here or for a TPU slice that is not here, and tells what
it takes. "train" times training steps on a batch of random pictures. "sample" times
the sampler of an untrained network, and how much of it is not the network. "data"
times the input pipeline of config.data.records.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.api.run import resolve
from imagen_jax.config import from_dict
from imagen_jax.errors import UserError
from imagen_jax.planning.chips import slice_devices
from imagen_jax.planning.compile import compile_step, params
from imagen_jax.sharding import check_batch_size, make_mesh
from imagen_jax.timings import time_data, time_sampler, time_steps


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            form = {float: ",.4g", int: ","}.get(type(value), "")
            shown = format(value, form)
            lines.append(f"{indent}{name:32} {shown}")
    return lines


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    config_flags.DEFINE_config_file("config", None, "FILE.py[:variant]")
    kinds = ["train", "sample", "data", "compile", "params"]
    flags.DEFINE_enum("what", None, kinds, "what to measure")
    flags.DEFINE_string("json", None, "file that gets the figures")
    flags.DEFINE_string("topology", None, "compile: for this slice, for example v4-512")
    flags.DEFINE_float(
        "seconds", 20.0, "train, sample, data: how long to measure", lower_bound=0
    )
    flags.mark_flags_as_required(["config", "what"])


def main() -> None:
    """Measures what the flags ask for."""
    args = flags.FLAGS
    if args.topology and args.what != "compile":
        raise UserError("--topology is for --what=compile: a program for it cannot run")
    cli.check_json(args.json)
    values = cli.config_values()
    cfg = resolve(values) if args.what == "data" else from_dict(values)
    if args.what == "params":
        report = params(cfg)
    else:
        mesh = make_mesh(cfg.mesh, args.topology and slice_devices(args.topology))
        check_batch_size(
            cfg.training.batch_size,
            mesh,
            "training.batch_size",
            cfg.training.microbatches,
        )
        if args.what == "compile":
            report = compile_step(cfg, mesh).report
        elif args.what == "sample":
            report = time_sampler(cfg, mesh, args.seconds)
        elif args.what == "data":
            report = time_data(cfg, mesh, args.seconds)
        else:
            report = time_steps(cfg, mesh, args.seconds)
    print("\n".join(_lines(report)))
    cli.write_json(args.json, report)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
