"""What one device moves and exchanges in a compiled program, read from its text (HLO).

XLA's own `cost_analysis` takes each loop's body once, counts memory on a TPU's chip
like main memory, and knows nothing of exchanges.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-[a-z]+?)"
    r"(-start)?"
)
# Operations that move nothing: they name what is there, or wait for it.
_FREE = re.compile(
    r"parameter|constant|(get-)?tuple(-element)?|bitcast|after-all|add-dependency"
    r"|opt(imization)?-barrier|partition-id|replica-id|.*-done|.*[a-z]-update"
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# name = type kind(operands), attributes. A literal instead of operands may hold
# anything but the name of an attribute behind ")".
_OPERATION = re.compile(
    r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(, [a-z_]+=.*)?$"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass
class Traffic:
    """What one device does in one run of a program.

    Attributes:
      bytes: read from and written to main memory, as tiles store them.
      cycles: of its clock, as the compiler estimates; 0 where it estimates nothing.
      collectives: exchanges by kind: how many run ("count"), and "bytes" that the
        device sends for them.
      unknown_loops: loops of unknown length, counted once.
    """

    bytes: float = 0
    cycles: int = 0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0


def read_program(text: str, devices: int) -> Traffic:
    """The traffic of a program on each of `devices`, from `compiled.as_text()`."""
    total = Traffic()
    _add(total, 1, "ENTRY", _parse(text), devices)
    return total


@functools.lru_cache(maxsize=2**16)
def array_bytes(type_: str) -> tuple[float, float]:
    """Bytes of a type such as "(f32[8,16]{1,0:T(8,128)S(1)}, u32[])".

    Returns:
      Those of the elements; and those of main memory, with tiles filled up.
    """
    size = main = 0.0
    for dtype, dimensions, layout in _ARRAY.findall(type_):
        bits = re.search(r"\d+", dtype)
        item = int(bits[0]) / 8 if bits else int(dtype == "pred")
        shape = _numbers(dimensions.replace("<=", ""))
        size += item * math.prod(shape)
        if not re.search(r"S\([1-9]", layout):  # memory on the chip
            main += item * math.prod(_padded(shape, layout))
    return size, main


def _padded(shape: list[int], layout: str) -> list[int]:
    """The shape in whole tiles, from the slowest dimension to the fastest."""
    padded = [shape[i] for i in reversed(_numbers(layout.partition(":")[0]))] or shape
    if found := re.search(r"T((?:\([\d,]*\))+)", layout):
        tile, *inner = map(_numbers, re.findall(r"\(([\d,]*)\)", found[1]))
        # The other tiles divide the first one's last dimensions.
        for each in inner:
            for i in range(-min(len(each), len(tile)), 0):
                tile[i] = -(-tile[i] // each[i]) * each[i]
        padded = [1] * (len(tile) - len(padded)) + padded
        for i in range(-len(tile), 0):
            padded[i] = -(-padded[i] // tile[i]) * tile[i]
    return padded


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


class _Operation(NamedTuple):
    type: str
    kind: str
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return _names(self.inside)

    @property
    def number(self) -> int | None:
        whole = self.kind == "constant" and re.fullmatch(r"-?\d+", self.inside)
        return int(self.inside) if whole else None

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found[1] if found else ""


class _Computation(dict[str, _Operation]):
    """Operations by name; the one that is the result also as "ROOT"."""

    def source(self, name: str) -> _Operation:
        """The operation that `name` is a copy of."""
        found = self[name]
        while found.kind in ("copy", "bitcast", "convert"):
            found = self[found.operands[0]]
        return found


def _parse(text: str) -> dict[str, _Computation]:
    """Computations by name; the one that the device runs also as "ENTRY".

    Raises:
      ValueError: for text of another form.
    """
    computations: dict[str, _Computation] = {}
    current = _Computation()
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations[start[2]] = _Computation()
            if start[1]:
                computations["ENTRY"] = current
        elif match := _OPERATION.match(line):
            is_root, name, *parts, rest = match.groups()
            current[name] = _Operation(*parts, rest or "")
            if is_root:
                current["ROOT"] = current[name]
    if "ENTRY" not in computations:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return computations


def _add(
    total: Traffic,
    times: int,
    name: str,
    computations: dict[str, _Computation],
    devices: int,
) -> None:
    """Adds a computation that runs `times` times."""
    inside = computations[name]
    for key, each in inside.items():
        if key == "ROOT" or _FREE.fullmatch(each.kind) or "AllocateBuffer" in each.rest:
            continue
        if each.kind == "while":
            turns = _turns(each, inside, computations)
            total.unknown_loops += turns is None
            body = each.attribute("body")
            _add(total, times * (turns or 1), body, computations, devices)
        elif each.kind in ("conditional", "call", "async-start"):
            # Which branch is taken is unknown: the longest.
            called = [n for n in _names(each.rest) if n in computations]
            longest = max(called, key=lambda name: len(computations[name]))
            _add(total, times, longest, computations, devices)
        else:
            total.bytes += times * _moved(each, inside)
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', each.rest):
                total.cycles += times * int(cycles[1])
            fused = each.attribute("calls") if each.kind == "fusion" else ""
            around = computations[fused] if fused else inside
            for part in around.values() if fused else [each]:
                if found := _COLLECTIVE.fullmatch(part.kind):
                    # A TPU's program has these as all-reduces inside of such fusions.
                    scatters = "all-reduce-scatter" in fused
                    kind = "reduce-scatter" if scatters else found[1]
                    own = total.collectives.setdefault(kind, {"count": 0, "bytes": 0})
                    own["count"] += times
                    own["bytes"] += times * _sent(kind, part, around, devices)
                    break


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", text)


def _turns(
    loop: _Operation, inside: _Computation, computations: dict[str, _Computation]
) -> int | None:
    """How often a loop runs, where the compiler notes it or its condition says.

    A TPU's compiler notes nothing, and may put two turns into one. Its conditions are
    understood if they are `i < limit` with a constant limit, and i grows by a constant.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    condition = computations[loop.attribute("condition")]
    body = computations[loop.attribute("body")]
    start = inside.source(loop.operands[0]).operands
    test = condition["ROOT"]
    if test.attribute("direction") != "LT":
        return None
    counter, limit = (condition.source(name) for name in test.operands)
    if counter.kind != "get-tuple-element" or limit.number is None:
        return None
    index = int(counter.attribute("index"))
    grown = body[body["ROOT"].operands[index]]
    steps = [body.source(name).number for name in grown.operands]
    # A counter begins at 0 unless a number is seen.
    first = inside.source(start[index]).number or 0
    return next((-(-(limit.number - first) // n) for n in steps if n), None)


def _moved(operation: _Operation, inside: _Computation) -> float:
    """Bytes that an operation reads from and writes to main memory."""
    made = array_bytes(operation.type)[1]
    taken = [array_bytes(inside[name].type)[1] for name in operation.operands]
    if operation.kind in ("slice", "dynamic-slice", "gather"):
        return 2 * made
    if operation.kind == "dynamic-update-slice":
        return 2 * taken[1]
    # The result of a start repeats its operands.
    return made if operation.kind.endswith("-start") else made + sum(taken)


def _sent(
    kind: str, operation: _Operation, inside: _Computation, devices: int
) -> float:
    """Bytes that a device sends for an exchange, its group in a ring."""
    size = sum(array_bytes(inside[name].type)[0] for name in operation.operands)
    if kind.startswith("collective"):
        return size
    group = group_size(operation.rest, devices)
    if kind == "all-gather":
        return size * (group - 1)
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def group_size(rest: str, devices: int) -> int:
    """The number of devices that exchange with one another in a collective.

    Args:
      rest: the attributes of the collective.
      devices: of the program, for a collective that names no groups.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(_numbers(found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):
        return _numbers(found[1])[-1]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'?([\w.-]+)'?=(\d+)", found[1]))
        axes = re.findall(r"'([\w.-]+)'(?::\((\d+)\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, _, part in axes)
    if re.search(r"replica_groups=(?!\{\})", rest):
        raise ValueError(f"unknown form of a collective's groups: {rest[:200]}")
    return devices
