"""Measures a stage: what it weighs, how it compiles, how fast it trains.

python -m imagen_jax.benchmark --config=configs/sr256.py:tiny --what=train \
    [--json=FILE] [--seconds=20] [--config.training.batch_size=4]
python -m imagen_jax.benchmark --config=configs/base64.py --what=params
python -m imagen_jax.benchmark --config=configs/base64.py --what=compile \
    --topology=v4-512 --config.mesh.fsdp=16
python -m imagen_jax.benchmark --config=configs/tiny.py:base --what=sample \
    --config.sampler.name=dpmpp --config.sampler.steps=25

"params" counts parameters per block, without making them. "compile" compiles a
training step for the devices here or for a TPU slice that is not here, and tells what
it takes. "train" times training steps on a batch of random pictures. "sample" times
the sampler of an untrained network, and how much of it is not the network.
"""

import collections
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.batch import Batch, batch_spec
from imagen_jax.compilation import compiler_options
from imagen_jax.config import StageConfig, from_dict
from imagen_jax.diffusion.cascade import Settings, compile_sampler
from imagen_jax.diffusion.sampler import guidance_weights
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.models.flops import forward_flops
from imagen_jax.sharding import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    row_shards,
)
from imagen_jax.topology import slice_devices
from imagen_jax.training.state import abstract_state, create_state
from imagen_jax.training.step import compile_train_step

_GIB = 2**30


def params(cfg: StageConfig) -> dict[str, Any]:
    """Parameters of the network: all, and of each of its blocks."""
    tree = network.abstract_inputs(cfg)[0]
    blocks = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(block))
        for name, block in tree.items()
    }
    return {
        "parameters": sum(blocks.values()),
        "leaves": len(jax.tree.leaves(tree)),
        "forward_flops_per_image": forward_flops(cfg),
        "blocks": blocks,
    }


def compile_step(cfg: StageConfig, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """What it takes to compile a training step, and the compiled step.

    Memory and work are one device's; work is what the compiler says of its program,
    recomputation and normalisation included. Of loops it would count one turn, so a
    stage with `scan_blocks` has none.

    Raises:
      UserError: when the program does not fit into a device's memory.
    """
    rows = batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_spec(cfg)
    )
    start = time.perf_counter()
    lowered = compile_train_step(cfg, mesh).lower(abstract_state(cfg, mesh), batch)
    traced = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the training step does not fit into the memory of {mesh.size} devices; "
            "raise config.mesh.fsdp, lower config.training.batch_size or set "
            f"config.model.remat. The compiler says: {str(error).splitlines()[0]}"
        ) from None
    done = time.perf_counter()
    memory, cost, text = (
        compiled.memory_analysis(),
        compiled.cost_analysis(),
        compiled.as_text(),
    )
    kinds = collections.Counter(re.findall(r"= .*? ([a-z][a-z0-9-]*)\(", text))
    report = {
        "devices": mesh.size,
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "host_memory_gib": cli.peak_memory_gib(),
        "arguments_gib": memory.argument_size_in_bytes / _GIB,
        "outputs_gib": memory.output_size_in_bytes / _GIB,
        "outputs_in_place_of_arguments_gib": memory.alias_size_in_bytes / _GIB,
        "temporaries_gib": memory.temp_size_in_bytes / _GIB,
        "program_gib": memory.generated_code_size_in_bytes / _GIB,
        "operations": sum(kinds.values()),
        "collectives": collectives(text),
        "largest_array": largest_array(text),
    }
    if not cfg.model.scan_blocks:
        report["flops"] = cost["flops"]
        report["bytes_accessed"] = cost["bytes accessed"]
    return report, compiled


def collectives(program: str) -> dict[str, int]:
    """How many exchanges between devices a compiled program has, of each kind."""
    found = collections.Counter(
        re.findall(r"= .*? (all-[a-z-]*|reduce-scatter|collective-[a-z-]*)\(", program)
    )
    # A TPU's program has these as all-reduces inside of fusions of this name.
    scattered = len(re.findall(r"calls=%all-reduce-scatter", program))
    found.update({"reduce-scatter": scattered, "all-reduce": -scattered})
    return {
        kind: count
        for kind, count in found.items()
        if count and not kind.endswith("-done")
    }


def largest_array(program: str) -> str:
    """The largest array of a compiled program, as "bf16[8,64,64,512]"."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1}
    arrays = set(re.findall(rf"\b({'|'.join(sizes)})\[([\d,]+)\]", program))
    dtype, shape = max(
        arrays, key=lambda a: sizes[a[0]] * math.prod(map(int, a[1].split(",")))
    )
    return f"{dtype}[{shape}]"


def random_batch(cfg: StageConfig, mesh: Mesh) -> Batch:
    """Pictures of noise, with captions of full length."""
    random = np.random.default_rng(0)
    spec = batch_spec(cfg)
    text = random.standard_normal(spec.text.shape, np.float32)
    batch = Batch(
        image=random.integers(0, 256, spec.image.shape, np.uint8),
        text=text.astype(spec.text.dtype),
        mask=np.ones(spec.mask.shape, bool),
        id=np.arange(cfg.training.batch_size, dtype=np.int32),
    )
    return jax.device_put(batch, batch_sharding(mesh))


def matmul_flops_per_second(dtype: str, device: jax.Device) -> float:
    """What a large product reaches on one device: the ceiling of everything else."""
    size = 2048 if device.platform == "cpu" else 8192
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.dot)
    times = _times(lambda: product(a, a).block_until_ready(), 2.0)
    return 2 * size**3 / min(times)


def _times(run: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each of at least three runs, after one that is not counted."""
    times = []
    while len(times) < 4 or sum(times[1:]) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[1:]


def time_steps(cfg: StageConfig, mesh: Mesh, seconds: float) -> dict[str, Any]:
    """Times training steps for about `seconds`, and compares them with a product."""
    compilation, step = compile_step(cfg, mesh)
    state, batch = create_state(cfg, mesh), random_batch(cfg, mesh)

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    times = _times(run, seconds)
    median = statistics.median(times)
    device = mesh.devices.flat[0]
    peak = matmul_flops_per_second(cfg.model.dtype, device) * mesh.size
    forward = forward_flops(cfg)
    done = 3 * forward * cfg.training.batch_size / median
    memory = device.memory_stats()
    return {
        "device": device.device_kind,
        "batch_size": cfg.training.batch_size,
        "steps": len(times),
        "step_seconds": {"median": median, "min": min(times), "max": max(times)},
        "steps_per_second": 1 / median,
        "images_per_second": cfg.training.batch_size / median,
        "forward_flops_per_image": forward,
        "flops_per_second": done,
        "matmul_flops_per_second": peak,
        "share_of_matmul": done / peak,
        "device_memory_gib": memory and memory["peak_bytes_in_use"] / _GIB,
        "host_memory_gib": cli.peak_memory_gib(),
        "compilation": compilation,
    }


def time_sampler(cfg: StageConfig, mesh: Mesh, seconds: float) -> dict[str, Any]:
    """Times batches of the stage's sampler, and the same with a network that is free.

    What that takes is thresholding, noise, conversions and the steps themselves.
    """
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh).params)
    key = jax.random.key(0)
    params = jax.jit(
        lambda: nn.unbox(network.init(cfg, key)),
        out_shardings=shardings,
        compiler_options=compiler_options(mesh, once=True),
    )()
    rows = -(-cfg.sampler.batch_size // row_shards(mesh)) * row_shards(mesh)
    text = np.ones((rows, cfg.text.length, cfg.text.dim), np.float32)
    own = Settings.of(cfg.sampler, rows)
    low = cfg.lowres_size
    inputs = jax.device_put(
        (
            np.arange(rows, dtype=np.uint32),
            text,
            np.ones((rows, cfg.text.length), bool),
            own.guidance,
            own.aug_level,
            np.full((rows, low, low, 3), 128, np.uint8) if low else None,
        ),
        batch_sharding(mesh),
    )
    times = {}
    for name, apply in (("all", network.apply), ("free", _free)):
        run = compile_sampler(apply, cfg, mesh)
        times[name] = _times(
            lambda run=run: jax.block_until_ready(run(params, *inputs)), seconds
        )
    median = statistics.median(times["all"])
    outside = statistics.median(times["free"])
    guided = int((guidance_weights(cfg.sampler) != 1).sum())
    passes = cfg.sampler.steps + guided
    return {
        "device": mesh.devices.flat[0].device_kind,
        "batch_size": rows,
        "sampler": cfg.sampler.name,
        "steps": cfg.sampler.steps,
        "network_passes": passes,
        "batch_seconds": {
            "median": median,
            "min": min(times["all"]),
            "max": max(times["all"]),
        },
        "images_per_second": rows / median,
        "pass_seconds_per_image": (median - outside) / passes / rows,
        "outside_seconds_per_image_and_step": outside / cfg.sampler.steps / rows,
        "share_outside_the_network": outside / median,
        "host_memory_gib": cli.peak_memory_gib(),
    }


def _free(cfg, params, z, logsnr, cond):
    return z


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
    kinds = ["train", "sample", "compile", "params"]
    flags.DEFINE_enum("what", None, kinds, "what to measure")
    flags.DEFINE_string("json", None, "file that gets the figures")
    flags.DEFINE_string("topology", None, "compile: for this slice, for example v4-512")
    flags.DEFINE_float(
        "seconds", 20.0, "train, sample: how long to measure", lower_bound=0
    )
    flags.mark_flags_as_required(["config", "what"])


def main() -> None:
    """Measures what the flags ask for."""
    args = flags.FLAGS
    if args.topology and args.what != "compile":
        raise UserError("--topology is for --what=compile: a program for it cannot run")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json={args.json} is a folder; name a file in it")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: there is no such folder; make it first")
    cfg = from_dict(cli.config_values())
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
            report, _ = compile_step(cfg, mesh)
        elif args.what == "sample":
            report = time_sampler(cfg, mesh, args.seconds)
        else:
            report = time_steps(cfg, mesh, args.seconds)
    print("\n".join(_lines(report)))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
