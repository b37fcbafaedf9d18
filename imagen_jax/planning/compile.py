"""What a stage weighs, and what its compiled programs take and do."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax import cli
from imagen_jax.batch import batch_spec
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.cascade import compile_sampler
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.planning.flops import forward_flops
from imagen_jax.planning.work import Program, read_program
from imagen_jax.sharding import batch_sharding, row_shards
from imagen_jax.training.state import abstract_state
from imagen_jax.training.step import compile_train_step

_GIB = 2**30
_SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1}


class DoesNotFit(UserError):
    """A program needs more memory than a device has.

    Attributes:
      needed_gib: of one device, where the compiler says it, else 0.
    """

    def __init__(self, message: str, needed_gib: float):
        super().__init__(message)
        self.needed_gib = needed_gib


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, and what it takes.

    Attributes:
      run: to be called with what it was lowered for.
      program: its work, one device's.
      report: times, memory and sizes.
    """

    run: Any
    program: Program
    report: dict[str, Any]


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


def abstract_batch(cfg: StageConfig, mesh: Mesh) -> Any:
    """A global batch on the mesh, without data."""
    rows = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_spec(cfg)
    )


def compile_step(cfg: StageConfig, mesh: Mesh) -> Compiled:
    """Compiles the training step.

    Raises:
      DoesNotFit: into a device's memory.
    """
    start = time.perf_counter()
    lowered = compile_train_step(cfg, mesh).lower(
        abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
    )
    rows = cfg.training.batch_size
    return _compile(lowered, mesh, "the training step", rows, start)


def sampled_rows(cfg: StageConfig, mesh: Mesh) -> int:
    """Pictures in one call of the sampler: a multiple of what the mesh divides by."""
    return -(-cfg.sampler.batch_size // row_shards(mesh)) * row_shards(mesh)


def compile_sampling(cfg: StageConfig, mesh: Mesh) -> Compiled:
    """Compiles the stage's sampler: all of its steps, for `sampled_rows` pictures.

    Raises:
      DoesNotFit: into a device's memory.
    """
    count, low = sampled_rows(cfg, mesh), cfg.lowres_size
    rows = batch_sharding(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=rows)

    start = time.perf_counter()
    lowered = compile_sampler(network.apply, cfg, mesh).lower(
        abstract_state(cfg, mesh).params,
        array(jnp.uint32),
        array(jnp.float32, cfg.text.length, cfg.text.dim),
        array(jnp.bool_, cfg.text.length),
        array(jnp.float32, cfg.sampler.steps),
        array(jnp.float32),
        array(jnp.uint8, low, low, 3) if low else None,
    )
    return _compile(lowered, mesh, "the sampler", count, start)


def _compile(lowered: Any, mesh: Mesh, what: str, rows: int, start: float) -> Compiled:
    """Compiles, and reads what came of it.

    Memory and work are one device's; bytes are those of its main memory. The
    compiler's own counts take loops' bodies once.
    """
    traced = time.perf_counter()
    try:
        run = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise DoesNotFit(
            f"{what} does not fit into the memory of {mesh.size} devices. The "
            f"compiler says: {first}",
            needed_gib(first),
        ) from None
    done = time.perf_counter()
    memory, cost, text = run.memory_analysis(), run.cost_analysis(), run.as_text()
    program = read_program(text, mesh.size)
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
        "operations": len(program.work),
        "matrix_flops": program.total("flops"),
        "memory_bytes": program.total("moved_bytes"),
        "collectives": program.collectives(),
        "largest_array": largest_array(text),
        "arrays_as_long_as_the_batch": arrays_of(text, rows),
        "loops_counted_once": {
            "flops": cost["flops"],
            "bytes_accessed": cost["bytes accessed"],
        },
    }
    return Compiled(run, program, report)


def needed_gib(message: str) -> float:
    """The memory that a compiler says it would need, 0 where it does not say."""
    sizes = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
    for pattern in (r"Used ([\d.]+)([KMGT])", r"\(([\d.]+)([KMGT])\) exceeds"):
        if found := re.search(pattern, message):
            return float(found[1]) * sizes[found[2]]
    return 0.0


def _arrays(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and shapes in a compiled program's text, the largest first."""
    found = set(re.findall(rf"\b({'|'.join(_SIZES)})\[([\d,]+)\]", program))
    shapes = [(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found]
    return sorted(shapes, key=lambda a: (-_SIZES[a[0]] * math.prod(a[1]), a))


def _written(array: tuple[str, tuple[int, ...]]) -> str:
    return f"{array[0]}[{','.join(map(str, array[1]))}]"


def largest_array(program: str) -> str:
    """The largest array of a compiled program, as "bf16[8,64,64,512]"."""
    return _written(_arrays(program)[0])


def arrays_of(program: str, rows: int) -> list[str]:
    """Arrays of a compiled program with a dimension of `rows`, the largest first.

    On many devices there should be none of a global batch's rows: each has its own. An
    array that is as wide as the batch is long is told too.
    """
    return [_written(each) for each in _arrays(program) if rows in each[1]]
