"""Captioned scenes of simple shapes, drawn by code at any resolution.

They need no download, and `judge.judge` says whether a picture shows what its caption
asks for. Six shapes and eight colours, small or large, alone, counted, or one beside
another. Lengths are fractions of the picture's side, x to the right and y down.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from imagen_jax.errors import UserError

BACKGROUND = (255, 255, 255)

# Far apart as directions from white: a pixel that is half background tells its colour.
COLOURS = {
    "red": (220, 20, 40),
    "orange": (255, 130, 0),
    "yellow": (255, 225, 0),
    "green": (0, 150, 60),
    "cyan": (0, 200, 220),
    "blue": (40, 60, 220),
    "purple": (150, 40, 180),
    "black": (20, 20, 20),
}

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")

# One shape for each colour: every word is trained on, these pairs never are.
HELD_OUT = frozenset(
    (colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)
)
_TRAINED = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]

RELATIONS = ("above", "below", "left of", "right of")

# Radii are "small" below this and "large" above; drawn ones differ by 7 % or more.
SIZE_BORDER = 0.195
_ALONE_RADII = {"small": (0.17, 0.18), "large": (0.28, 0.38)}
_TOGETHER_RADII = {"small": (0.15, 0.165), "large": (0.21, 0.22)}
# 1.3 pixels of 16 between two items, so that one pixel is mostly background.
_GAP = 0.08
_MARGIN = 0.02

_SQUARE = 0.88  # half a side, for about the circle's area
_TRIANGLE = 3**0.5 / 2  # half the height of an equilateral triangle of side 2
_CROSS = 1 / 3  # half the width of an arm
_RING = 0.5  # the hole
AREAS = {  # of the shapes of radius 1
    "circle": np.pi,
    "square": 4 * _SQUARE**2,
    "triangle": 2 * _TRIANGLE,
    "cross": 4 * (2 * _CROSS - _CROSS**2),
    "ring": np.pi * (1 - _RING**2),
    "diamond": 2.0,
}

# Coverage is computed on at least this many pixels a side and averaged down.
_FINE = 64

_COUNTS = {"two": 2, "three": 3}
_PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing in a scene; it fits the square of side `2 * radius` around (x, y)."""

    shape: str  # one of SHAPES
    colour: str  # one of COLOURS
    size: str  # "small", "large", or "" when the caption does not say
    x: float  # centre, in [0, 1]
    y: float
    radius: float  # in (0, 0.5]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One item, two or three equal items, or two in a relation."""

    items: tuple[Item, ...]  # the first is the subject of the caption
    relation: str = ""  # one of RELATIONS, or ""


class Request(NamedTuple):
    """What a caption asks for."""

    things: tuple[tuple[str, str, str], ...]  # (size or "", colour, shape) of each
    relation: str = ""  # of the first thing to the second


def caption(scene: Scene) -> str:
    """The scene in words.

    >>> circle = Item("circle", "red", "small", 0.5, 0.2, 0.17)
    >>> square = Item("square", "orange", "", 0.5, 0.7, 0.2)
    >>> caption(Scene((circle,)))
    'a small red circle'
    >>> caption(Scene((circle, circle)))
    'two small red circles'
    >>> caption(Scene((circle, square), "above"))
    'a small red circle above an orange square'
    """
    if scene.relation:
        first, second = map(_one, scene.items)
        return f"{first} {scene.relation} {second}"
    item, number = scene.items[0], len(scene.items)
    if number == 1:
        return _one(item)
    (count,) = (word for word, n in _COUNTS.items() if n == number)
    words = count, item.size, item.colour, _PLURALS[item.shape]
    return " ".join(filter(None, words))


def _one(item: Item) -> str:
    words = " ".join(filter(None, (item.size, item.colour, item.shape)))
    return ("an " if words[0] in "aeiou" else "a ") + words


_SIZE_COLOUR = rf"(?:(small|large) )?({'|'.join(COLOURS)})"
_ONE = rf"an? {_SIZE_COLOUR} ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_ONE}(?: ({'|'.join(RELATIONS)}) {_ONE})?")
_COUNTED = re.compile(
    rf"({'|'.join(_COUNTS)}) {_SIZE_COLOUR} ({'|'.join(_PLURALS.values())})"
)


def parse(text: str) -> Request:
    """What a caption asks for; the inverse of `caption`.

    Raises:
      UserError: when `text` is no caption of a scene.
    """
    if found := _COUNTED.fullmatch(text):
        count, size, colour, plural = found.groups("")
        shape = next(s for s in SHAPES if _PLURALS[s] == plural)
        return Request(((size, colour, shape),) * _COUNTS[count])
    if found := _CAPTION.fullmatch(text):
        words, relation = found.groups(""), found[4] or ""
        return Request((words[:3], words[4:]) if relation else (words[:3],), relation)
    raise UserError(
        f"{text!r} is not a caption of a shapes scene; write it like 'a red circle', "
        "'two small green squares' or 'a large blue ring left of a black cross', with "
        f"{list(SHAPES)}, {list(COLOURS)} and {list(RELATIONS)}"
    )


def generate(count: int, seed: int) -> Iterator[Scene]:
    """Scenes of the training split: no `HELD_OUT` pair of colour and shape occurs.

    Of 20 scenes 13 show one item, 4 two or three equal ones, 3 two in a relation.
    Scene i depends on `seed` (not negative) and i only.
    """
    for i in range(count):
        yield _scene(np.random.default_rng((seed, 0, i)), _TRAINED)


def heldout(count: int, seed: int) -> Iterator[Scene]:
    """Like `generate`, but every caption has a `HELD_OUT` pair (its first item)."""
    for i in range(count):
        yield _scene(np.random.default_rng((seed, 1, i)), sorted(HELD_OUT))


def _scene(rng, pairs) -> Scene:
    kind = rng.choice(["one", "counted", "related"], p=[0.65, 0.2, 0.15])
    says_size = rng.random() < 0.5
    pair = pairs[rng.integers(len(pairs))]
    radii = _ALONE_RADII if kind == "one" else _TOGETHER_RADII

    def sized():
        size = ("small", "large")[rng.integers(2)]
        return size, float(rng.uniform(*radii[size]))

    def item(pair, size, radius, centre):
        colour, shape = pair
        return Item(shape, colour, size if says_size else "", *centre, radius)

    size, radius = sized()
    if kind != "related":
        number = 1 if kind == "one" else int(rng.integers(2, 4))
        centres = _spread(rng, radius, number)
        return Scene(tuple(item(pair, size, radius, c) for c in centres))

    others = [other for other in _TRAINED if other != pair]
    other = others[rng.integers(len(others))]
    other_size, other_radius = sized()
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    if relation in ("below", "right of"):
        places = _line(rng, (other_radius, radius))[::-1]
    else:
        places = _line(rng, (radius, other_radius))
    # Drift across the line stays below the distance along it.
    across = [float(p) for p in rng.uniform(0.4, 0.6, 2)]
    centres = list(zip(across, places, strict=True))
    if relation in ("left of", "right of"):
        centres = [centre[::-1] for centre in centres]
    first = item(pair, size, radius, centres[0])
    second = item(other, other_size, other_radius, centres[1])
    return Scene((first, second), relation)


def _line(rng, radii: tuple[float, ...]) -> list[float]:
    """Two centres along a side, in order, apart from each other and from its ends."""
    slack = 1 - 2 * _MARGIN - 2 * sum(radii) - _GAP
    shifts = np.sort(rng.uniform(0, max(slack, 0.0), 2))
    ends = _MARGIN, _MARGIN + 2 * radii[0] + _GAP
    return [float(e + r + s) for e, r, s in zip(ends, radii, shifts, strict=True)]


def _spread(rng, radius: float, number: int) -> list[tuple[float, float]]:
    """A centre anywhere, two side by side, or a third beyond the line of two."""

    def anywhere():
        return float(rng.uniform(radius + _MARGIN, 1 - radius - _MARGIN))

    if number == 1:
        return [(anywhere(), anywhere())]
    first, second = _line(rng, (radius, radius))
    if number == 2:
        row = float(rng.uniform(0.4, 0.6))
        centres = [(first, row), (second, row)]
    else:
        row, other = _line(rng, (radius, radius))[:: rng.choice([-1, 1])]
        centres = [(first, row), (second, row), (anywhere(), other)]
    if rng.random() < 0.5:
        centres = [(y, x) for x, y in centres]
    return centres


def _triangle(u, v):
    sides = _TRIANGLE * np.abs(u) - 0.5 * v - 0.5 * _TRIANGLE
    return np.maximum(sides, v - _TRIANGLE)


def _cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - _CROSS, np.maximum(u, v) - 1)


def _ring(u, v):
    middle = (1 + _RING) / 2
    return np.abs(np.hypot(u, v) - middle) - (1 - middle)


# Signed distance to the edge of the shape of radius 1, negative inside. Beyond
# corners it is a lower bound, which moves coverage by a fraction of one pixel.
_DISTANCES = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - _SQUARE,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "diamond": lambda u, v: (np.abs(u) + np.abs(v) - 1) * 0.5**0.5,
}


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius) -> np.ndarray:
    """The part of each pixel in [0, 1] that a shape covers: its edge is a ramp.

    `dx` and `dy` are pixel centres minus the shape's; they and `radius` are in pixels
    and broadcast.
    """
    distance = _DISTANCES[shape](dx / radius, dy / radius) * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw(scene: Scene, size: int) -> np.ndarray:
    """The scene as a uint8 picture `[size, size, 3]`, anti-aliased.

    A picture of 16 or 32 pixels is the mean of the same picture at 64, so drawing
    small equals drawing large and halving, up to the rounding of each.
    """
    factor = -(-_FINE // size)
    fine = size * factor
    picture = np.full((fine, fine, 3), BACKGROUND, np.float32)
    middles = np.arange(fine, dtype=np.float32)
    for item in scene.items:
        dx, dy = (middles + (0.5 - at * fine) for at in (item.x, item.y))
        alpha = coverage(item.shape, dx[None, :], dy[:, None], item.radius * fine)
        picture += alpha[..., None] * (np.float32(COLOURS[item.colour]) - picture)
    picture = picture.reshape(size, factor, size, factor, 3).mean((1, 3))
    return np.rint(picture).astype(np.uint8)
