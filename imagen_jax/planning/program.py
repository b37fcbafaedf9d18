"""What a program computes, by its jaxpr, and moves and exchanges, by its text (HLO).

XLA's own count takes loops once, a TPU's chip as main memory, and knows no exchanges.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from imagen_jax.config import StageConfig
from imagen_jax.models import network

_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-[a-z]+?)"
    r"(-start)?"
)
# Operations that move nothing: they name what is there, or wait for it.
_FREE = re.compile(
    r"parameter|constant|(get-)?tuple(-element)?|bitcast|after-all|add-dependency"
    r"|opt(imization)?-barrier|partition-id|replica-id|.*-done|.*[a-z]-update"
)
_SPACE = re.compile(r", [su]8\[\d+\]")
_SLICES = ("slice", "dynamic-slice", "gather")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# name = type kind(operands or a literal), attributes.
_OPERATION = re.compile(
    r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(, [a-z_-]+=.*)?$"
)
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


@functools.lru_cache(maxsize=2**16)
def arrays(type_: str) -> list[tuple[float, bool]]:
    """The bytes of each array of a type, and whether they lie in main memory."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(type_):
        bits = re.search(r"\d+", dtype)
        item = int(bits[0]) / 8 if bits else int(dtype == "pred")
        size = item * math.prod(int(n) for n in re.findall(r"\d+", shape))
        found.append((size, not re.search(r"S\([1-9]", layout)))
    return found


def _main(type_: str) -> float:
    return sum(size for size, main in arrays(type_) if main)


class _Operation(NamedTuple):
    type: str
    kind: str
    inside: str
    rest: str
    operands: list[str]

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found[1] if found else ""

    @property
    def number(self) -> int | None:
        whole = self.kind == "constant" and re.fullmatch(r"-?\d+", self.inside)
        return int(self.inside) if whole else None


# Operations by name; the result is the last one.
_Computation = dict[str, _Operation]


def _parse(text: str) -> dict[str, _Computation]:
    """Computations by name; the one that the device runs also as "ENTRY"."""
    computations: dict[str, _Computation] = {}
    current: _Computation = {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations[start[2]] = {}
            if start[1]:
                computations["ENTRY"] = current
        elif match := _OPERATION.match(line):
            _, name, type_, kind, inside, rest = match.groups(default="")
            operands = _NAME.findall(inside)
            current[name] = _Operation(type_, kind, inside, rest, operands)
    return computations


class Traffic:
    """What each of `devices` does in one run of a program, by `compiled.as_text()`.

    Links join `linked` of them, which are adjacent; others exchange over a network.
    On a torus `places` are the devices' coordinates.
    """

    def __init__(
        self,
        text: str,
        devices: int,
        linked: int | None = None,
        places: Sequence[tuple[int, ...]] = (),
    ):
        self.bytes = 0.0  # from and to main memory, without tiles' padding
        # Cycles of its clock, as the compiler estimates, by the kind of operation.
        self.cycles: dict[str, int] = {}
        # Exchanges by kind: their "count", and the "bytes" that it sends for them.
        self.collectives: dict[str, dict[str, float]] = {}
        # Bytes that it sends to groups that links join; on a torus, over each axis.
        self.linked = 0.0
        self.early = 0.0  # those of them that other work may run beside
        self.network = 0.0  # bytes that it sends over its card, to other groups
        self.unknown_loops = 0  # loops of unknown length, counted once
        self._computations, self._devices = _parse(text), devices
        self._linked, self._places = linked or devices, places
        self._add("ENTRY", 1)

    def _add(self, name: str, times: int) -> None:
        """Adds a computation that runs `times` times."""
        inside = self._computations[name]
        for key, each in inside.items():
            if each.kind == "while":
                turns = self._turns(each)
                self.unknown_loops += turns is None
                self._add(each.attribute("body"), times * (turns or 1))
            elif each.kind in ("conditional", "call", "async-start"):
                # Which branch is taken is unknown: the longest.
                names = [n for n in _NAME.findall(each.rest) if n in self._computations]
                self._add(max(names, key=lambda n: len(self._computations[n])), times)
            elif not _FREE.fullmatch(each.kind) and "AllocateBuffer" not in each.rest:
                self.bytes += times * self._moved(each, inside)
                if cycles := re.search(r'"estimated_cycles":"(\d+)"', each.rest):
                    kind = self._kind(each)
                    own = times * int(cycles[1])
                    self.cycles[kind] = self.cycles.get(kind, 0) + own
                self._add_exchange(key, inside, times)

    def _kind(self, operation: _Operation) -> str:
        """Its kind; a fusion is a convolution or a reduction if it has one inside."""
        if operation.kind != "fusion":
            return operation.kind
        fused = self._computations[operation.attribute("calls")].values()
        kinds = {self._kind(each) for each in fused}
        return next((k for k in ("convolution", "reduce") if k in kinds), "fusion")

    def _turns(self, loop: _Operation) -> int | None:
        """How often a loop runs: as noted, or by its condition.

        A TPU's compiler notes nothing, and may put two turns into one. Understood is
        `i < limit` where i begins at 0 and grows by a constant.
        """
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(noted[1])
        condition = self._computations[loop.attribute("condition")]
        body = self._computations[loop.attribute("body")]
        *_, test = condition.values()
        *_, result = body.values()
        if test.attribute("direction") != "LT":
            return None
        counter, limit = (condition[name] for name in test.operands)
        if counter.kind != "get-tuple-element" or limit.number is None:
            return None
        grown = body[result.operands[int(counter.attribute("index"))]]
        steps = [body[name].number for name in grown.operands]
        return next((-(-limit.number // step) for step in steps if step), None)

    def _add_exchange(self, name: str, inside: _Computation, times: int):
        """Adds the exchange that an operation is, or that is fused into it."""
        operation = inside[name]
        fused = operation.attribute("calls") if operation.kind == "fusion" else ""
        # A TPU's exchange beside other work is in fusions that start, do and end it.
        starts = name.startswith("async-collective-start")
        ends = name.startswith("async-collective-done")
        if ends or fused.startswith("async_collective"):
            return
        inside = self._computations[fused] if fused else inside
        for each in inside.values() if fused else [operation]:
            if found := _COLLECTIVE.fullmatch(each.kind):
                # A TPU's program has these as all-reduces inside of such fusions.
                kind = "reduce-scatter" if "all-reduce-scatter" in fused else found[1]
                types = [inside[name].type for name in each.operands]
                size = sum(size for type_ in types for size, _ in arrays(type_))
                own = self.collectives.setdefault(kind, {"count": 0, "bytes": 0})
                sent = times * size * self._sent_share(kind, each.rest)
                own["count"] += times
                own["bytes"] += sent
                if self._linked == self._devices:
                    sent /= self._axes(kind, each.rest)
                    self.linked += sent
                    self.early += sent if found[3] or starts else 0
                else:
                    self._add_by_way(each.rest, sent)
                break

    def _add_by_way(self, rest: str, sent: float) -> None:
        """Adds what is sent in a group to that over links or over the network.

        As many rings as a group has members in a box cross to the next, each over the
        card of one of them.
        """
        boxes = [each // self._linked for each in group(rest, self._devices)]
        if len(set(boxes)) == 1:
            self.linked += sent
        else:
            self.network += sent / boxes.count(boxes[0])

    def _axes(self, kind: str, rest: str) -> int:
        """Axes of the torus whose rings share what a group sends; at least 1.

        They are those that it covers from end to end. Slices with a side of less than 4
        chips are no torus.
        """
        sides = [len(set(axis)) for axis in zip(*self._places, strict=True)]
        if min(sides, default=0) < 4 or kind.startswith("collective"):
            return 1
        own = [self._places[each] for each in group(rest, self._devices)]
        covered = [len(set(axis)) for axis in zip(*own, strict=True)]
        return max(1, sum(map(int.__eq__, covered, sides)))

    def _sent_share(self, kind: str, rest: str) -> float:
        """What a device sends for an exchange in a ring, over what it has."""
        if kind.startswith("collective"):
            return 1
        size = len(group(rest, self._devices))
        if kind == "all-gather":
            return size - 1
        return (2 if kind == "all-reduce" else 1) * (size - 1) / size

    def _moved(self, operation: _Operation, inside: _Computation) -> float:
        """Bytes that an operation reads from and writes to main memory."""
        made, kind = _main(operation.type), operation.kind
        if kind == "custom-call":  # beside its result may be cuDNN's or cuBLAS's space
            made = _main(_SPACE.sub("", operation.type))
        if kind in _SLICES:
            return 2 * made
        if kind == "slice-start":
            (_, source_main), (size, main), *_ = arrays(operation.type)
            return size * (source_main + main)
        if kind.endswith("-start"):
            return made  # which repeats the operands
        for number, name in enumerate(operation.operands):
            if whole := _main(inside[name].type):
                fused = operation.attribute("calls") if kind == "fusion" else ""
                made += min(whole, self._read(number, fused) if fused else whole)
        return made

    def _read(self, number: int, fused: str) -> float:
        """Bytes of an operand's slices that a fusion reads; infinity for all of it."""
        inside, total, names = self._computations[fused], 0.0, set()
        for key, each in inside.items():
            if each.kind == "parameter" and each.inside == str(number):
                names.add(key)
            elif used := names.intersection(each.operands):
                if each.kind == "bitcast":
                    names.add(key)
                elif each.kind in _SLICES:
                    total += sum(size for size, _ in arrays(each.type))
                elif each.kind == "fusion":
                    place = each.operands.index(used.pop())
                    total += self._read(place, each.attribute("calls"))
                else:
                    return math.inf
        return total


def group(rest: str, devices: int) -> list[int]:
    """The first of the groups that exchange; without groups it is all of `devices`."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return _numbers(found[1])
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", rest):
        ids = _ordered(_numbers(found[2]), _numbers(found[3]))
        return ids.reshape(_numbers(found[1]))[0].tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        sizes = re.findall(r"'?([\w.-]+)'?=(\d+)", found[1])
        shape = [int(size) for _, size in sizes]
        order = re.search(iota, found[2])
        ids = _ordered(*map(_numbers, order.groups())) if order else _ordered(shape)
        # Of an axis, all, or a part that is named with the product of those before it.
        axes = re.findall(r"'([\w.-]+)'(?::\((\d+)\)(\d+))?", found[3])
        taken: list[int | slice] = [0] * len(shape)
        for axis, before, part in axes:
            place = [name for name, _ in sizes].index(axis)
            step = shape[place] // (int(before) * int(part)) if part else 1
            taken[place] = slice(0, step * int(part) if part else None, step)
        return ids.reshape(shape)[tuple(taken)].flatten().tolist()
    if re.search(r"replica_groups=(?!\{\})", rest):
        raise ValueError(f"unknown form of a collective's groups: {rest[:200]}")
    return list(range(devices))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]


def _ordered(shape: list[int], order: list[int] = ()) -> np.ndarray:
    """The numbers from 0 in an array of that shape, its axes in another order."""
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(order) if len(order) else ids


def forward_flops(cfg: StageConfig) -> int:
    """FLOPs of one training image or crop through the network, once."""
    trace = jax.make_jaxpr(network.apply, static_argnums=0)
    return count_flops(trace(cfg.model, *network.abstract_inputs(cfg)).jaxpr)


def count_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of a traced function's matrix products and convolutions, on all devices.

    A multiplication and its addition are two, what a convolution pads with is nothing.
    A loop counts by its length (`while`, of unknown length, once), a kernel by its
    grid, and a conditional by its costliest branch.
    """
    return sum(_count(equation) for equation in jaxpr.eqns)


def _count(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return (
            2 * math.prod(shape[i] for i in contracted) * equation.outvars[0].aval.size
        )
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name.startswith("dot_product_attention"):  # cuDNN's, whose inside is not traced
        rows, pixels, heads, width = equation.invars[0].aval.shape
        keys = equation.invars[1].aval.shape[1]
        # Logits and their product with values; these and all gradients backward.
        products = 5 if "bwd" in name else 2
        return products * 2 * rows * heads * pixels * keys * width
    inner = [count_flops(each) for each in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    if name == "shard_map":
        return params["mesh"].size * sum(inner)
    return params.get("length", 1) * sum(inner)


def _convolution(equation: JaxprEqn) -> int:
    image, kernel = (each.aval.shape for each in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    axes = params["dimension_numbers"]
    flops = 2 * out[axes.out_spec[0]] * out[axes.out_spec[1]] * kernel[axes.rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        size = image[axes.lhs_spec[i + 2]]
        places = np.arange(out[axes.out_spec[i + 2]])[:, None]
        taps = np.arange(kernel[axes.rhs_spec[i + 2]]) * params["rhs_dilation"][i]
        met = places * params["window_strides"][i] + taps - low
        spread = params["lhs_dilation"][i]
        inside = (met >= 0) & (met <= (size - 1) * spread) & (met % spread == 0)
        flops *= int(inside.sum())
    return flops
