"""Measures a stage: what it weighs, how it compiles, how fast it trains.

python -m imagen_jax.benchmark --config=sr256:tiny --what=train \
    [--json=FILE] [--seconds=20] [--config.training.batch_size=4]
python -m imagen_jax.benchmark --config=base64 --what=compile \
    --topology=v4-512 --config.mesh.fsdp=16

"params" counts parameters per block. "compile" compiles a training step for the
devices here or for an absent TPU slice, and tells what it takes. "train" times training
steps. "sample" times the sampler of an untrained network, and how much of it is not the
network. "data" times the input pipeline of config.data.records.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.api.run import resolve
from imagen_jax.batch import Batch, batch_spec
from imagen_jax.config import StageConfig, from_dict
from imagen_jax.data.pipeline import open_records
from imagen_jax.diffusion.cascade import compile_sampler
from imagen_jax.diffusion.sampler import guidance_weights
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.planning.chips import slice_devices
from imagen_jax.planning.compile import GIB, compile_step, sampler_inputs, summary
from imagen_jax.planning.program import forward_flops
from imagen_jax.sharding import batch_sharding, check_batch_size, make_mesh
from imagen_jax.training.state import abstract_state, create_state
from imagen_jax.training.step import compile_train_step


def params(cfg: StageConfig) -> dict[str, Any]:
    """Parameters of the network and of each of its blocks, without making them."""
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


def random_batch(cfg: StageConfig, mesh: Mesh) -> Batch:
    """Images and embeddings of noise, with captions of full length."""
    random, spec = np.random.default_rng(0), batch_spec(cfg)
    batch = Batch(
        image=random.integers(0, 256, spec.image.shape, np.uint8),
        text=random.standard_normal(spec.text.shape, np.float32).astype(jnp.bfloat16),
        mask=np.ones(spec.mask.shape, bool),
        id=np.arange(cfg.training.batch_size, dtype=np.int32),
    )
    return jax.device_put(batch, batch_sharding(mesh))


def matmul_flops_per_second(dtype: str, device: jax.Device) -> float:
    """What a large matrix product reaches on one device: the ceiling for all else."""
    size = 2048 if device.platform == "cpu" else 8192
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.dot)
    return 2 * size**3 / min(_times(lambda: product(a, a), 2.0))


def _times(run: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each of at least three runs, after one that is not counted."""
    times = []
    while len(times) < 4 or sum(times[1:]) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[1:]


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def time_steps(cfg: StageConfig, mesh: Mesh, seconds: float) -> dict[str, Any]:
    """Times training steps for about `seconds`, against a matrix product's speed."""
    step, figures = compile_step(cfg, mesh)
    if step is None:
        raise UserError(summary(figures))
    state, batch = create_state(cfg, mesh), random_batch(cfg, mesh)

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    times = _times(run, seconds)
    median = statistics.median(times)
    rate, forward = cfg.training.batch_size / median, forward_flops(cfg)
    device = mesh.devices.flat[0]
    peak = matmul_flops_per_second(cfg.model.dtype, device) * mesh.size
    memory = device.memory_stats()
    return {
        "device": device.device_kind,
        "batch_size": cfg.training.batch_size,
        "steps": len(times),
        "step_seconds": _spread(times),
        "steps_per_second": 1 / median,
        "images_per_second": rate,
        "forward_flops_per_image": forward,
        "flops_per_second": 3 * forward * rate,
        "matmul_flops_per_second": peak,
        "share_of_matmul": 3 * forward * rate / peak,
        "device_memory_gib": memory and memory["peak_bytes_in_use"] / GIB,
        "compilation": figures,
    }


def time_sampler(cfg: StageConfig, mesh: Mesh, seconds: float) -> dict[str, Any]:
    """Times batches of the stage's sampler, and the same without its network."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh).params)
    init = jax.jit(
        lambda key: nn.unbox(network.init(cfg, key)), out_shardings=shardings
    )
    own = init(jax.random.key(0))
    inputs = jax.device_put(sampler_inputs(cfg, mesh), batch_sharding(mesh))

    def times(apply):
        run = compile_sampler(apply, cfg, mesh)
        return _spread(_times(lambda: run(own, *inputs), seconds))

    whole, rows, steps = times(network.apply), len(inputs[0]), cfg.sampler.steps
    median, outside = whole["median"], times(_free)["median"]
    passes = steps + int((guidance_weights(cfg.sampler) != 1).sum())
    return {
        "device": mesh.devices.flat[0].device_kind,
        "batch_size": rows,
        "sampler": cfg.sampler.name,
        "steps": steps,
        "network_passes": passes,
        "batch_seconds": whole,
        "images_per_second": rows / median,
        "pass_seconds_per_image": (median - outside) / passes / rows,
        "outside_seconds_per_image_and_step": outside / steps / rows,
        "share_outside_the_network": outside / median,
    }


def _free(cfg, params, z, logsnr, cond):
    return z


def time_data(cfg: StageConfig, mesh: Mesh, seconds: float) -> dict[str, Any]:
    """Times the input pipeline alone, and how long a training step waits for it.

    "queues_gib" is what this process has grown by since the first batch was asked for.
    """
    size, start = cfg.training.batch_size, time.perf_counter()
    batches = open_records(cfg, mesh)
    before = cli.peak_memory_gib()
    next(batches)
    first = time.perf_counter() - start
    cpu = time.process_time()
    alone = _times(lambda: next(batches), seconds)
    cpu = time.process_time() - cpu
    held = cli.peak_memory_gib() - before

    state, step, waits = create_state(cfg, mesh), compile_train_step(cfg, mesh), []

    def run():
        nonlocal state
        asked = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - asked)
        state, metrics = step(state, batch)
        return metrics

    # Each step is waited for, so that only waiting for input is counted as such.
    trained = _times(run, seconds)
    waited, count = sum(waits[1:]), len(trained)
    return {
        "batch_size": size,
        "batches": len(alone),
        "first_batch_seconds": first,
        "images_per_second": len(alone) * size / sum(alone),
        "images_per_core_second": (len(alone) + 1) * size / cpu,
        "queues_gib": held,
        "training_steps": count,
        "training_steps_per_second": count / sum(trained),
        "wait_seconds_per_step": waited / count,
        "share_of_the_step_waiting": waited / sum(trained),
    }


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    config_flags.DEFINE_config_file("config", None, "NAME or FILE.py[:variant]")
    kinds = ["train", "sample", "data", "compile", "params"]
    flags.DEFINE_enum("what", None, kinds, "what to measure")
    flags.DEFINE_string("json", None, "file that gets the figures")
    flags.DEFINE_string("topology", None, "compile: for this slice, for example v4-512")
    flags.DEFINE_float("seconds", 20.0, "how long to measure", lower_bound=0)
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
        rows, parts = cfg.training.batch_size, cfg.training.microbatches
        if args.what != "sample":
            check_batch_size(rows, mesh, "training.batch_size", parts)
        timers = {"train": time_steps, "sample": time_sampler, "data": time_data}
        if args.what == "compile":
            report = compile_step(cfg, mesh)[1]
        else:
            report = timers[args.what](cfg, mesh, args.seconds)
        report["host_memory_gib"] = cli.peak_memory_gib()
    print(cli.table(report))
    cli.write_json(args.json, report)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
