"""What a stage weighs, and what its compiled training step takes."""

import collections
import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from imagen_jax import cli
from imagen_jax.batch import batch_spec
from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.models.flops import forward_flops
from imagen_jax.sharding import batch_sharding
from imagen_jax.training.state import abstract_state
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
