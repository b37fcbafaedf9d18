"""How fast a stage trains, samples and is fed, on the devices here."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagen_jax import cli
from imagen_jax.batch import Batch, batch_spec
from imagen_jax.compilation import compiler_options
from imagen_jax.config import StageConfig
from imagen_jax.data.pipeline import open_records, queue_bytes
from imagen_jax.diffusion.cascade import Settings, compile_sampler
from imagen_jax.diffusion.sampler import guidance_weights
from imagen_jax.models import network
from imagen_jax.planning.compile import compile_step
from imagen_jax.planning.flops import forward_flops
from imagen_jax.sharding import batch_sharding, row_shards
from imagen_jax.training.state import abstract_state, create_state
from imagen_jax.training.step import compile_train_step

_GIB = 2**30


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
    compiled = compile_step(cfg, mesh)
    state, batch = create_state(cfg, mesh), random_batch(cfg, mesh)

    def run():
        nonlocal state
        state, metrics = compiled.run(state, batch)
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
        "compilation": compiled.report,
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


def time_data(cfg: StageConfig, mesh: Mesh, seconds: float) -> dict[str, Any]:
    """Times the input pipeline alone, and what a training step waits for it.

    "queues_gib" is what this process has grown by since the first batch was asked for,
    with what threads work on; "queues_bound_gib" is what the config allows the queues.
    """
    start = time.perf_counter()
    stream = open_records(cfg, mesh)
    before = cli.peak_memory_gib()
    next(stream)
    first = time.perf_counter() - start
    size, count = cfg.training.batch_size, 0
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds or count < 3:
        jax.block_until_ready(next(stream))
        count += 1
    taken, cpu = time.perf_counter() - start, time.process_time() - cpu
    held = cli.peak_memory_gib() - before

    state = create_state(cfg, mesh)
    step = compile_train_step(cfg, mesh)
    state, metrics = step(state, next(stream))
    jax.block_until_ready(metrics)
    waited, steps, start = 0.0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds or steps < 3:
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        state, metrics = step(state, batch)
        # The loop of a training hands steps over ahead of the device; here each is
        # waited for, so that waiting for input is told from waiting for the step.
        jax.block_until_ready(metrics)
        steps += 1
    trained = time.perf_counter() - start
    return {
        "batch_size": size,
        "batches": count,
        "first_batch_seconds": first,
        "images_per_second": count * size / taken,
        "images_per_core_second": count * size / cpu,
        "queues_gib": held,
        "queues_bound_gib": queue_bytes(cfg, jax.process_count()) / _GIB,
        "training_steps": steps,
        "training_steps_per_second": steps / trained,
        "wait_seconds_per_step": waited / steps,
        "share_of_the_step_waiting": waited / trained,
        "host_memory_gib": cli.peak_memory_gib(),
    }
