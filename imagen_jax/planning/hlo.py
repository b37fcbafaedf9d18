"""Reads the text of a compiled program (XLA's HLO): operations, arrays, layouts."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OP = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
_KIND = re.compile(r" ([a-z][\w-]*)\(")
_END = re.compile(r"\)(?:, [a-z_]+=|$)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
      dtype: as XLA writes it: "bf16".
      shape: its dimensions.
      order: dimensions from the fastest to the slowest; () where nothing is said.
      tiles: of the layout; the first counts in elements of the fastest dimensions.
      space: memory that it lies in: 0 is a device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = 0

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
        if self.dtype in _BYTES:
            return _BYTES[self.dtype]
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return int(bits[1]) / 8 if bits else 4

    @property
    def logical_bytes(self) -> float:
        """Of the elements alone."""
        return self.itemsize * math.prod(self.shape)

    @property
    def padded_bytes(self) -> float:
        """With what tiles are filled up by: what is stored and moved."""
        if not self.tiles:
            return self.logical_bytes
        sizes = [self.shape[d] for d in self.order] or list(self.shape)
        tile = list(self.tiles[0])
        # The second tile divides the first one's last dimensions.
        for inner in self.tiles[1:]:
            for i, size in enumerate(reversed(inner), 1):
                if i <= len(tile):
                    tile[-i] = -(-tile[-i] // size) * size
        sizes += [1] * (len(tile) - len(sizes))
        for i, size in enumerate(reversed(tile)):
            sizes[i] = -(-sizes[i] // size) * size
        return self.itemsize * math.prod(sizes)


@dataclasses.dataclass(slots=True)
class Op:
    """An operation of a computation.

    Attributes:
      name: of its result.
      type: of its result, as written; see `arrays`.
      kind: "fusion", "all-gather-start", ...
      operands: names of what it takes.
      rest: what is written behind them: attributes, metadata, the compiler's notes.
      literal: what stands between the parentheses.
    """

    name: str
    type: str
    kind: str
    operands: list[str]
    rest: str
    literal: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The result; several of a tuple."""
        return arrays(self.type)

    def attribute(self, name: str) -> str | None:
        """The computation or value named by `name=`."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found and found[1]


@functools.lru_cache(maxsize=2**16)
def arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a type: "(f32[8,16]{1,0:T(8,128)S(1)}, u32[])"."""
    return tuple(_array(*match) for match in _ARRAY.findall(text))


def _array(dtype: str, shape: str, layout: str) -> Array:
    order, _, rest = layout.partition(":")
    tiles = re.search(r"T((?:\([\d,]*\))+)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        _numbers(shape.replace("<=", "")),
        _numbers(order),
        tuple(map(_numbers, re.findall(r"\(([\d,]*)\)", tiles[1]))) if tiles else (),
        int(space[1]) if space else 0,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


class Computation:
    """Operations by name, in order; the last one is the result."""

    def __init__(self, name: str):
        self.name = name
        self.ops: dict[str, Op] = {}
        self.root: Op | None = None

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops.values())

    def users(self, name: str) -> list[Op]:
        """The operations that take `name`."""
        return [op for op in self if name in op.operands]

    def parameters(self) -> list[Op]:
        """By their number."""
        found = [op for op in self if op.kind == "parameter"]
        return sorted(found, key=lambda op: int(op.literal))


def parse(program: str) -> tuple[dict[str, Computation], Computation]:
    """The computations of a program by name, and that which is run."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in program.splitlines():
        if line[:1] not in (" ", "\t"):
            start = _COMPUTATION.match(line)
            if start and " = " not in line.split("{")[0]:
                current = computations[start[2]] = Computation(start[2])
                entry = current if start[1] else entry
            elif line.startswith("}"):
                current = None
        elif current is not None and (match := _OP.match(line)):
            op = _operation(match[2], match[3])
            if op:
                current.ops[op.name] = op
                if match[1]:
                    current.root = op
    if entry is None:
        raise ValueError("this is no compiled program's text: it has no ENTRY")
    return computations, entry


def _operation(name: str, text: str) -> Op | None:
    kind = _KIND.search(text)
    if not kind:
        return None
    # A literal may hold anything, but not the name of an attribute behind ")".
    end = _END.search(text, kind.end())
    inside = text[kind.end() : end.start() if end else len(text)]
    operands = re.findall(r"%([\w.-]+)", inside)
    rest = text[end.start() + 1 :] if end else ""
    return Op(name, text[: kind.start()], kind[1], operands, rest, inside)


def source(computation: Computation, name: str) -> Op | None:
    """What `name` is a copy of."""
    op = computation.ops.get(name)
    while op and op.kind in ("copy", "bitcast", "convert"):
        op = computation.ops.get(op.operands[0])
    return op


def whole(op: Op | None) -> int | None:
    """The value of a constant whole number, else None."""
    if op and op.kind == "constant" and re.fullmatch(r"-?\d+", op.literal):
        return int(op.literal)
    return None


def group_size(op: Op, devices: int) -> int:
    """How many devices exchange with one another in a collective.

    Args:
      op: a collective.
      devices: of the program, for one that names no groups.
    """
    text = op.rest
    if found := re.search(r"source_target_pairs=\{", text):
        return 2
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", text):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'?([\w.-]+)'?=(\d+)", found[1]))
        axes = re.findall(r"'([\w.-]+)'(?::\((\d+)\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, _, part in axes)
    if re.search(r"replica_groups=(?!\{\})", text):
        raise ValueError(f"cannot read the groups of {op.name}: {text[:200]}")
    return devices
