"""How long a chip would take for a program, by its data sheet."""

import dataclasses

from imagen_jax.planning.chips import Chip
from imagen_jax.planning.work import Program

ASSUMPTIONS = (
    "peak rates of the data sheet; nothing here was run",
    "operations follow one another; each takes the longer of its arithmetic (matrix "
    "units only) and its traffic with the main memory, tiles filled up",
    "prefetches into memory on the chip cost the main memory's bandwidth only",
    "an exchange is a ring over one axis of the torus, both ways, without latency; "
    "those that the compiler starts early run beside the rest",
    "input is ready in time; no checkpoints, no failures, no previews",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program.

    Attributes:
      compute: all arithmetic at the peak rate.
      memory: all traffic at the main memory's bandwidth.
      interconnect: all exchanges, one after another.
      total: of operations in order; see `ASSUMPTIONS`.
      cycles: by the compiler's own estimate of its operations, with the exchanges; 0
        where it makes none.
    """

    compute: float
    memory: float
    interconnect: float
    total: float
    cycles: float


def estimate(program: Program, chip: Chip) -> Estimate:
    """The roofline of `program` on `chip`."""
    moved = program.total("moved_bytes") / chip.bandwidth
    in_order = exchanged = beside = 0.0
    for w in program.work:
        sent = w.times * w.sent_bytes / chip.link
        if w.overlaps:
            beside += sent
            busy = w.flops / chip.flops
        else:
            exchanged += sent
            busy = max(w.flops / chip.flops, w.moved_bytes / chip.bandwidth)
        in_order += w.times * busy
    cycles = program.total("cycles")
    return Estimate(
        compute=program.total("flops") / chip.flops,
        memory=moved,
        interconnect=exchanged + beside,
        total=max(in_order + exchanged, moved, beside),
        cycles=cycles / chip.clock + exchanged if cycles and chip.clock else 0.0,
    )
