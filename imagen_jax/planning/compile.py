"""A stage's training step or sampler, compiled for devices that may be absent."""

import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagen_jax.batch import batch_spec
from imagen_jax.compilation import planning_options
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.cascade import Settings, compile_sampler
from imagen_jax.models import network
from imagen_jax.planning.chips import CHIPS, GPUS_OF_A_BOX, Chip
from imagen_jax.planning.program import Traffic, count_flops, forward_flops
from imagen_jax.sharding import on_rows, row_shards
from imagen_jax.training.state import abstract_state
from imagen_jax.training.step import jit_train_step

ASSUMPTIONS = (
    "peak rates of the data sheet; arithmetic and main memory work side by side, "
    "exchanges beside nothing (rings without latency, both ways over each axis of a "
    "TPU's torus that a group covers, or over NVLink and between boxes the network); "
    "no waiting for input, no checkpoints, previews or failures"
)
GIB = 2**30
Figures = dict[str, Any]


def compile_step(
    cfg: StageConfig, mesh: Mesh, quick: bool = True
) -> tuple[Any, Figures]:
    """The compiled training step, None if it does not fit, and its figures.

    Unless `quick`, the compiler's estimate of cycles is among them.
    """
    rows = cfg.training.batch_size
    arguments = abstract_state(cfg, mesh), on_rows(batch_spec(cfg), mesh)
    run, found = _compile(jit_train_step(cfg, mesh), arguments, mesh, rows, quick)
    found |= {"stage": cfg.name, "what": "train", "remat": cfg.model.remat}
    found["microbatches"] = cfg.training.microbatches
    if seconds := found.get("step_seconds"):
        # What is computed again does not count.
        flops = 3 * forward_flops(cfg) * rows / mesh.size
        found["peak_share"] *= flops / found["flops_per_chip"]
        found["days"] = seconds * cfg.training.steps / 86400
        found["chip_hours"] = 24 * found["days"] * mesh.size
    return run, found


def compile_sampling(
    cfg: StageConfig, mesh: Mesh, quick: bool = True
) -> tuple[Any, Figures]:
    """The stage's compiled sampler, and figures, as `compile_step` returns them."""
    inputs = sampler_inputs(cfg, mesh)
    arguments = abstract_state(cfg, mesh).params, *on_rows(inputs, mesh)
    jitted, rows = compile_sampler(network.apply, cfg, mesh), len(inputs[0])
    run, found = _compile(jitted, arguments, mesh, rows, quick)
    found |= {"stage": cfg.name, "what": "sample"}
    if seconds := found.get("step_seconds"):
        found["step_seconds"] = seconds / cfg.sampler.steps
        found["chip_seconds_per_image"] = seconds * mesh.size / rows
    return run, found


def sampler_inputs(cfg: StageConfig, mesh: Mesh) -> tuple:
    """What the sampler takes beside parameters, for rows that the mesh divides."""
    rows = -(-cfg.sampler.batch_size // row_shards(mesh)) * row_shards(mesh)
    text, low, own = cfg.text, cfg.lowres_size, Settings.of(cfg.sampler, rows)
    return (
        np.arange(rows, dtype=np.uint32),
        np.ones((rows, text.length, text.dim), jnp.bfloat16),
        np.ones((rows, text.length), bool),
        own.guidance,
        own.aug_level,
        np.full((rows, low, low, 3), 128, np.uint8) if low else None,
    )


def shard_gib(tree: Any) -> float:
    """What one device holds of a tree of abstract arrays, without tiles' padding."""
    leaves = jax.tree.leaves(tree)
    shapes = [(x.dtype.itemsize, x.sharding.shard_shape(x.shape)) for x in leaves]
    return sum(size * math.prod(shape) for size, shape in shapes) / GIB


def _compile(
    jitted: Any, arguments: tuple, mesh: Mesh, rows: int, quick: bool
) -> tuple[Any, Figures]:
    device, start = mesh.devices.flat[0], time.perf_counter()
    traced = jitted.trace(*arguments)
    lowered = traced.lower()
    middle = time.perf_counter()
    try:
        run = lowered.compile(compiler_options=planning_options(device, quick))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).splitlines()[0]
        return None, {"fits": False, "hbm_gib_per_chip": needed_gib(why), "why": why}
    end = time.perf_counter()

    memory, chip = run.memory_analysis(), CHIPS.get(device.device_kind)
    # Outputs that do not take the place of an argument.
    outputs = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    parts = {
        "arguments": memory.argument_size_in_bytes / GIB,
        "outputs": outputs / GIB,
        "temporaries": memory.temp_size_in_bytes / GIB,
        "program": memory.generated_code_size_in_bytes / GIB,
    }
    total, limit = sum(parts.values()), chip.memory_gib if chip else None
    linked = GPUS_OF_A_BOX if chip and chip.network else mesh.size
    places = [getattr(each, "coords", ()) for each in mesh.devices.flat]
    traffic = Traffic(run.as_text(), mesh.size, min(linked, mesh.size), places)
    found = {
        "chip": device.device_kind,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": rows,
        "fits": limit is None or total <= limit,
        "hbm_gib_per_chip": total,
        "hbm_limit_gib": limit,
        "memory_gib": parts,
        "flops_per_chip": count_flops(traced.jaxpr.jaxpr) / mesh.size,
        "bytes_per_chip": traffic.bytes,
        "collectives": traffic.collectives,
        "collective_bytes_per_chip": sum(
            each["bytes"] for each in traffic.collectives.values()
        ),
        "network_bytes_per_chip": traffic.network,
        "loops_of_unknown_length": traffic.unknown_loops,
        "cycles": {} if quick else traffic.cycles,
        "trace_seconds": middle - start,
        "compile_seconds": end - middle,
        "step_seconds": None,
    }
    sent = traffic.linked, traffic.early
    return run, found | (_times(found, *sent, chip) if chip else {})


def needed_gib(message: str) -> float:
    """The memory that a compiler's message says it would need, 0 if it does not say."""
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    units = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
    return float(found[1]) * units[found[2]] if found else 0.0


def _times(found: Figures, linked: float, early: float, chip: Chip) -> Figures:
    """Times of one run by the data sheet, with `ASSUMPTIONS`."""
    compute = found["flops_per_chip"] / chip.flops
    memory = found["bytes_per_chip"] / chip.bandwidth
    exchanges = linked / chip.link
    if over_network := found["network_bytes_per_chip"]:
        exchanges += over_network / chip.network
    seconds = max(compute, memory) + exchanges
    lines = {
        "compute_seconds": compute,
        "memory_seconds": memory,
        "interconnect_seconds": exchanges,
    }
    if cycles := sum(found["cycles"].values()):
        alone = cycles / chip.clock + exchanges
        lines["by_the_compilers_cycles"] = alone
        hidden = max(alone - early / chip.link, exchanges)
        lines["with_early_exchanges_hidden"] = hidden
    return {
        "roofline": lines,
        "step_seconds": seconds,
        "peak_share": compute / seconds,
        "images_per_second": found["batch_size"] / seconds,
    }


def summary(found: Figures) -> str:
    """The verdict in one line: "fits: 6.21 GiB a chip, 0.111 s a step"."""
    text = "fits" if found["fits"] else "does not fit"
    text += f": {found['hbm_gib_per_chip']:.2f} GiB a chip"
    if seconds := found.get("step_seconds"):
        text += f", {seconds:.4g} s a step"
    return text + (f" ({found['why']})" if "why" in found else "")
