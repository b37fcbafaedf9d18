"""What one device does when it runs a compiled program once.

A compiler's own count of a program with loops takes each loop's body once. Here bodies
count as often as they run.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Sequence

from imagen_jax.planning.hlo import (
    Array,
    Computation,
    Op,
    group_size,
    parse,
    source,
    whole,
)
from imagen_jax.planning.products import attention, convolution, dot

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They name or rename what is there, or are counted by what they call.
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "add-dependency",
    "optimization-barrier",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
_SLICES = ("dynamic-slice", "slice", "gather")
_ALLOCATION = '"AllocateBuffer"'


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation that a device runs, with what is fused into it.

    Attributes:
      name: of the operation.
      times: how often it runs.
      flops: of its convolutions and products, two for a multiplication with its
        addition; what padding would add is not in it.
      moved_bytes: read from and written to the main memory, as tiles store them.
      logical_bytes: the same without what tiles are filled up by.
      near_bytes: read from and written to memory on the chip, as tiles store them.
      collective: its kind, if it is an exchange between devices.
      sent_bytes: that a device sends for it, in a ring.
      overlaps: whether other operations run while it is under way.
      cycles: of the device's clock, as its compiler estimates; 0 where it says nothing.
    """

    name: str
    times: int = 1
    flops: float = 0
    moved_bytes: float = 0
    logical_bytes: float = 0
    near_bytes: float = 0
    collective: str = ""
    sent_bytes: float = 0
    overlaps: bool = False
    cycles: float = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, read.

    Attributes:
      work: what a device does, in no particular order.
      unknown_loops: loops whose number of turns could not be read: counted once.
      unknown_kernels: names of kernels whose arithmetic is not told.
    """

    work: list[Work]
    unknown_loops: int
    unknown_kernels: list[str]

    def total(self, field: str) -> float:
        """The sum of a field of `Work`, each as often as it runs."""
        return sum(w.times * getattr(w, field) for w in self.work)

    def collectives(self) -> dict[str, dict[str, float]]:
        """Of each kind, how many run and the bytes that a device sends for them."""
        found: dict[str, dict[str, float]] = {}
        for w in self.work:
            if w.collective:
                row = found.setdefault(w.collective, {"count": 0, "bytes": 0})
                row["count"] += w.times
                row["bytes"] += w.times * w.sent_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def read_program(text: str, devices: int) -> Program:
    """Reads a compiled program's text, as `compiled.as_text()` gives it.

    Args:
      text: of the program.
      devices: that run it.
    """
    return _Reader(text, devices).read()


class _Reader:
    def __init__(self, text: str, devices: int):
        self.computations, self.entry = parse(text)
        self.devices = devices
        self.found: list[Work] = []
        self.unknown_loops = 0
        self.kernels: collections.Counter[str] = collections.Counter()
        self.reads: dict[tuple[str, int], list[Array] | None] = {}
        self.flops: dict[str, float] = {}

    def read(self) -> Program:
        self.run(self.entry, 1, False)
        return Program(self.found, self.unknown_loops, sorted(self.kernels))

    def called(self, op: Op, name: str) -> Computation | None:
        return self.computations.get(op.attribute(name) or "")

    def run(self, computation: Computation, times: int, overlaps: bool) -> None:
        for op in computation:
            if op.kind == "while":
                turns = self.turns(op, computation)
                self.run(self.called(op, "body"), times * turns, overlaps)
            elif op.kind == "conditional":
                # The costlier way, as nobody knows which is taken.
                branches = self.branches(op)
                self.run(max(branches, key=self.cost), times, overlaps)
            elif op.kind in ("call", "async-start"):
                target = self.called(op, "to_apply") or self.called(op, "calls")
                if target:
                    self.run(target, times, op.kind == "async-start" or overlaps)
            elif not self.is_free(op):
                self.found.append(self.one(op, computation, times, overlaps))

    def is_free(self, op: Op) -> bool:
        done = op.kind.endswith(("-done", "-update"))
        return op.kind in _FREE or done or _ALLOCATION in op.rest

    def branches(self, op: Op) -> list[Computation]:
        names = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
        if names:
            found = re.findall(r"%?([\w.-]+)", names[1])
        else:
            found = [op.attribute(f"{b}_computation") for b in ("true", "false")]
        return [self.computations[name] for name in found]

    def cost(self, computation: Computation) -> tuple[float, int]:
        return self.flops_inside(computation), len(computation.ops)

    def turns(self, op: Op, computation: Computation) -> int:
        """How often a loop runs: as the compiler notes, or as its condition says."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest)
        if noted:
            return int(noted[1])
        turns = self.counted(op, computation)
        if turns is None:
            self.unknown_loops += 1
        return turns or 1

    def counted(self, op: Op, computation: Computation) -> int | None:
        """Turns of `while i < limit`, i growing by the same in each; else None."""
        condition, body = self.called(op, "condition"), self.called(op, "body")
        test, start = condition.root, computation.ops.get(op.operands[0])
        if not test or "direction=LT" not in self.text_of(test):
            return None
        if len(test.operands) != 2:
            return None
        counter, limit = (source(condition, name) for name in test.operands)
        outside = start.operands if start and start.kind == "tuple" else []
        if limit and limit.kind == "get-tuple-element" and outside:
            limit = source(computation, outside[int(limit.attribute("index"))])
        if not counter or counter.kind != "get-tuple-element" or not body.root:
            return None
        index = int(counter.attribute("index"))
        grown = body.ops.get(body.root.operands[index])
        added = [whole(source(body, name)) for name in grown.operands] if grown else []
        step = next((n for n in added if n), None)
        # Counters begin at 0 unless a number is seen.
        first = whole(source(computation, outside[index])) if outside else None
        if step is None or whole(limit) is None:
            return None
        return -(-(whole(limit) - (first or 0)) // step)

    def text_of(self, op: Op) -> str:
        inner = self.called(op, "calls")
        return inner.root.rest if inner and inner.root else op.rest

    def one(self, op: Op, inside: Computation, times: int, overlaps: bool) -> Work:
        read, written = self.traffic(op, inside)
        all_ = read + written
        main = [a for a in all_ if not a.space]
        kind, exchange, within = self.exchange(op, inside)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        flops = self.flops_of(op, inside)
        if "tpu_custom_call" in op.rest:
            cost = attention(op, inside) or _stated(op)
            flops += cost
            if not cost:
                self.kernels[_origin(op)] += 1
        return Work(
            name=op.name,
            times=times,
            flops=flops,
            moved_bytes=sum(a.padded_bytes for a in main),
            logical_bytes=sum(a.logical_bytes for a in main),
            near_bytes=sum(a.padded_bytes for a in all_ if a.space),
            collective=kind,
            sent_bytes=self.sent(kind, exchange, within) if kind else 0,
            overlaps=overlaps or op.kind.endswith("-start"),
            cycles=int(estimate[1]) if estimate else 0,
        )

    def exchange(
        self, op: Op, inside: Computation
    ) -> tuple[str, Op | None, Computation | None]:
        """What an operation exchanges: kind, the collective, and where it stands."""
        kind = op.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            return kind, op, inside
        inner = self.called(op, "calls") if op.kind == "fusion" else None
        for each in inner or ():
            kind = each.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                # A TPU's program has these as all-reduces inside of such fusions.
                if "all-reduce-scatter" in inner.name:
                    kind = "reduce-scatter"
                return kind, each, inner
        return "", None, None

    def sent(self, kind: str, op: Op, inside: Computation) -> float:
        """Bytes that a device sends, the group in a ring."""
        k = group_size(op, self.devices)
        size = sum(
            array.logical_bytes
            for name in op.operands
            if name in inside.ops
            for array in inside.ops[name].arrays
        )
        share = (k - 1) / k
        if kind == "all-gather":
            return size * (k - 1)
        if kind == "all-reduce":
            return 2 * size * share
        return size if kind.startswith("collective") else size * share

    def traffic(self, op: Op, inside: Computation) -> tuple[list[Array], list[Array]]:
        """Arrays that an operation reads and writes."""
        operands = [inside.ops[n] for n in op.operands if n in inside.ops]
        if op.kind == "fusion" and (inner := self.called(op, "calls")):
            read = []
            for i, operand in enumerate(operands):
                part = self.read_of(inner, i)
                read += operand.arrays if part is None else part
            return read, self.written_by(inner, op)
        arrays = [a for operand in operands for a in operand.arrays]
        if op.kind in _SLICES:
            return list(op.arrays), list(op.arrays)
        if op.kind == "dynamic-update-slice":
            update = list(operands[1].arrays)
            return update, update
        if op.kind.endswith("-start"):
            # The result of a start repeats what it takes, and has a flag.
            made = [a for a in op.arrays if a not in arrays and a.shape]
            if op.kind.endswith("slice-start"):
                return _placed(made, arrays), made
            return arrays, made
        if op.kind in ("broadcast", "iota"):
            return [a for a in arrays if a.shape], list(op.arrays)
        return arrays, list(op.arrays)

    def read_of(self, computation: Computation, index: int) -> list[Array] | None:
        """What a fusion reads of an operand; None for all of it."""
        key = computation.name, index
        if key not in self.reads:
            self.reads[key] = self.find_reads(computation, index)
        return self.reads[key]

    def find_reads(self, computation: Computation, index: int) -> list[Array] | None:
        parameters = computation.parameters()
        if index >= len(parameters):
            return None
        found: list[Array] = []
        names = [parameters[index].name]
        space = parameters[index].arrays[:1]
        while names:
            name = names.pop()
            for user in computation.users(name):
                if user.kind == "bitcast":
                    names.append(user.name)
                elif user.kind in _SLICES and user.operands[0] == name:
                    found += _placed(user.arrays, space)
                elif (
                    user.kind == "dynamic-update-slice"
                    and user.operands[0] == name
                    and user.operands.count(name) == 1
                ):
                    # Written in place: nothing is read.
                    pass
                elif user.kind == "fusion" and user.operands.count(name) == 1:
                    inner = self.called(user, "calls")
                    part = self.read_of(inner, user.operands.index(name))
                    if part is None:
                        return None
                    found += _placed(part, space)
                else:
                    return None
        return found

    def written_by(self, computation: Computation, op: Op) -> list[Array]:
        """What a fusion writes: of arrays updated in place, only the update."""
        root = computation.root
        roots = [root]
        if root and root.kind == "tuple":
            roots = [computation.ops.get(name) for name in root.operands]
        if len(roots) != len(op.arrays):
            return list(op.arrays)
        return [
            update
            for made, whole in zip(roots, op.arrays, strict=True)
            for update in self.update(computation, made, whole)
        ]

    def update(
        self, computation: Computation, made: Op | None, whole: Array
    ) -> list[Array]:
        while made and made.kind == "bitcast":
            made = computation.ops.get(made.operands[0])
        if made and made.kind == "dynamic-update-slice":
            update = computation.ops.get(made.operands[1])
            if update:
                return _placed(update.arrays, (whole,))
        if made and made.kind == "fusion" and (inner := self.called(made, "calls")):
            return self.written_by(inner, made)
        return [whole]

    def flops_of(self, op: Op, inside: Computation) -> float:
        if op.kind == "dot":
            return dot(op, inside)
        if op.kind == "convolution":
            return convolution(op, inside)
        inner = self.called(op, "calls") if op.kind == "fusion" else None
        return self.flops_inside(inner) if inner else 0

    def flops_inside(self, computation: Computation) -> float:
        if computation.name not in self.flops:
            self.flops[computation.name] = sum(
                self.flops_of(op, computation) for op in computation
            )
        return self.flops[computation.name]


def _placed(arrays: Sequence[Array], like: Sequence[Array]) -> list[Array]:
    """Parts of `like`, which lie where it lies."""
    space = like[0].space if like else 0
    return [dataclasses.replace(array, space=space) for array in arrays]


def _stated(op: Op) -> float:
    """The arithmetic that a kernel's author states, or 0."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', op.rest)
    return float(json.loads(found[1]).get("flops", 0)) if found else 0.0


def _origin(op: Op) -> str:
    found = re.search(r'op_name="([^"]*)"', op.rest)
    return found[1].split("/")[-1] if found else op.name
