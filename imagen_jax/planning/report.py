"""The figures of a plan: what a compiled program takes of each chip, and how long."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from imagen_jax.config import StageConfig
from imagen_jax.diffusion.sampler import guidance_weights
from imagen_jax.planning.chips import Chip, chip_of
from imagen_jax.planning.compile import Compiled, abstract_batch, sampled_rows
from imagen_jax.planning.flops import forward_flops
from imagen_jax.planning.roofline import estimate
from imagen_jax.training.state import abstract_state

_GIB = 2**30
_DAY = 86400


def shard_gib(tree: Any) -> float:
    """What one device holds of a tree of abstract arrays, without tiles' padding."""
    return (
        sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )
        / _GIB
    )


def memory_limit_gib(mesh: Mesh) -> float | None:
    """What programs may use of one device; None where nobody says."""
    device = mesh.devices.flat[0]
    if chip := chip_of(device):
        return chip.memory_gib
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:
        return None
    return stats["bytes_limit"] / _GIB if stats and "bytes_limit" in stats else None


def needed_memory(cfg: StageConfig, mesh: Mesh, made: Compiled, what: str) -> dict:
    """GiB of one device, by what they hold. The first rows are of shapes alone."""
    state, report = abstract_state(cfg, mesh), made.report
    parts = {"parameters": shard_gib(state.params)}
    if what == "train":
        parts["optimizer"] = shard_gib(state.opt_state)
        parts["ema"] = shard_gib(state.ema)
        parts["batch"] = shard_gib(abstract_batch(cfg, mesh))
    arguments = report["arguments_gib"]
    rest = arguments - sum(parts.values())
    # A sampler's other arguments are its inputs.
    parts["padding of these" if what == "train" else "inputs and padding"] = rest
    extra = report["outputs_gib"] - report["outputs_in_place_of_arguments_gib"]
    parts["outputs"] = max(extra, 0.0)
    parts["temporaries"] = report["temporaries_gib"]
    parts["program"] = report["program_gib"]
    return parts


def model_flops(cfg: StageConfig, mesh: Mesh, what: str) -> float:
    """The network's own arithmetic in one run of the program, over all devices."""
    if what == "train":
        return 3.0 * forward_flops(cfg) * cfg.training.batch_size
    guided = int((guidance_weights(cfg.sampler) != 1).sum())
    passes = cfg.sampler.steps + guided
    whole = dataclasses.replace(cfg, crop_size=0)
    return float(forward_flops(whole)) * passes * sampled_rows(cfg, mesh)


def figures(cfg: StageConfig, mesh: Mesh, made: Compiled, what: str) -> dict[str, Any]:
    """Everything a plan tells of a compiled program. Counts are one chip's.

    Args:
      cfg: the stage.
      mesh: that it is planned for.
      made: the compiled training step or sampler.
      what: "train" or "sample".
    """
    chip, limit = chip_of(mesh.devices.flat[0]), memory_limit_gib(mesh)
    memory = needed_memory(cfg, mesh, made, what)
    total = sum(memory.values())
    program, report = made.program, made.report
    rows = cfg.training.batch_size if what == "train" else sampled_rows(cfg, mesh)
    moved, logical = program.total("moved_bytes"), program.total("logical_bytes")
    stored = report["arguments_gib"]
    held = shard_gib(abstract_state(cfg, mesh)) + shard_gib(abstract_batch(cfg, mesh))
    found = {
        "stage": cfg.name,
        "what": what,
        "chip": mesh.devices.flat[0].device_kind,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": rows,
        "microbatches": cfg.training.microbatches if what == "train" else 1,
        "remat": cfg.model.remat if what == "train" else "none",
        "fits": limit is None or total <= limit,
        "hbm_gib_per_chip": total,
        "hbm_limit_gib": limit,
        "memory_gib": memory,
        "flops_per_chip": report["matrix_flops"],
        "bytes_per_chip": moved,
        "collectives": report["collectives"],
        "collective_bytes_per_chip": program.total("sent_bytes"),
        "padding_waste": {
            "of_bytes": 1 - logical / moved if moved else 0.0,
            "of_arguments": 1 - held / stored if what == "train" and stored else None,
        },
        "largest_array": report["largest_array"],
        "arrays_as_long_as_the_batch": report["arrays_as_long_as_the_batch"],
        "operations": report["operations"],
        "loops_of_unknown_length": program.unknown_loops,
        "kernels_of_unknown_arithmetic": program.unknown_kernels,
        "compiler": report["loops_counted_once"],
        "trace_seconds": report["trace_seconds"],
        "compile_seconds": report["compile_seconds"],
        "host_memory_gib": report["host_memory_gib"],
    }
    return {**found, **_times(cfg, mesh, made, chip, rows, what)}


def _times(
    cfg: StageConfig,
    mesh: Mesh,
    made: Compiled,
    chip: Chip | None,
    rows: int,
    what: str,
) -> dict[str, Any]:
    """By the roofline; None where the chip's rates are unknown."""
    if chip is None:
        names = ("roofline", "step_seconds", "peak_share", "images_per_second", "days")
        return dict.fromkeys((*names, "chip_hours"))
    seconds = estimate(made.program, chip)
    done = model_flops(cfg, mesh, what) / mesh.size
    share = done / seconds.total / chip.flops
    found = {
        "roofline": {
            "compute_seconds": seconds.compute,
            "memory_seconds": seconds.memory,
            "interconnect_seconds": seconds.interconnect,
            "by_the_compilers_cycles": seconds.cycles or None,
        },
        "peak_share_by_cycles": share * seconds.total / seconds.cycles
        if seconds.cycles
        else None,
        "peak_share": share,
        "images_per_second": rows / seconds.total,
    }
    if what == "sample":
        each = seconds.total / cfg.sampler.steps
        return {
            **found,
            "step_seconds": each,
            "seconds": seconds.total,
            "chip_seconds_per_image": seconds.total * mesh.size / rows,
            "days": None,
            "chip_hours": None,
        }
    days = seconds.total * cfg.training.steps / _DAY
    return {
        **found,
        "step_seconds": seconds.total,
        "days": days,
        "chip_hours": days * 24 * mesh.size,
    }
