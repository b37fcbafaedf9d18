"""Captioned pictures that lie in their range as photographs do, and a judge of them.

One shape on a ground. Everything is muted and in the middle of the range: the caption
names two of twelve hues, and chroma, brightness and the fall of the light are left
open. So guidance moves every pixel, and what it moves has room to be burnt out. The
demo's drawings are mostly white paper, which is at the end of the range and stays.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from imagen_jax import pictures
from imagen_jax.data import shapes
from imagen_jax.data.judge import fit_shape

# Every 30 degrees of the hue circle, from red. The cube's corners are every other one.
HUES = "red orange yellow lime green mint cyan azure blue violet magenta rose".split()
# Unit vectors across the grey axis: towards red, and 90 degrees on towards lime.
_ACROSS = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]]) / 6**0.5
# Of values in [-1, 1]. The largest sum is 1.03 and the middle half lies within 0.3.
_CHROMA = (0.25, 0.6)
_BRIGHTNESS = 0.3
_LIGHT = 0.15
_JITTER = 8  # degrees
_FINE = 64


def _colour(rng, hue: int) -> np.ndarray:
    angle = np.deg2rad(30 * hue + rng.uniform(-_JITTER, _JITTER))
    across = np.array([np.cos(angle), np.sin(angle)]) @ _ACROSS
    return rng.uniform(*_CHROMA) * across + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)


def draw(seed: int, size: int = 16) -> tuple[np.ndarray, str]:
    """A picture `[size, size, 3]` uint8 and its caption.

    The hues of shape and ground are at least 60 degrees apart.
    """
    rng = np.random.default_rng((seed, 7))
    shape = shapes.SHAPES[rng.integers(len(shapes.SHAPES))]
    ground = int(rng.integers(12))
    hue = (ground + int(rng.integers(2, 11))) % 12
    radius = rng.uniform(0.22, 0.38)
    x, y = rng.uniform(radius + 0.02, 0.98 - radius, 2)
    at = (np.arange(_FINE) + 0.5) / _FINE
    alpha = shapes.coverage(
        shape,
        _FINE * (at[None, :] - x),
        _FINE * (at[:, None] - y),
        _FINE * radius,
    )[..., None]
    picture = alpha * _colour(rng, hue) + (1 - alpha) * _colour(rng, ground)
    slope = rng.uniform(-_LIGHT, _LIGHT, 2)
    picture += (slope[0] * (2 * at - 1)[:, None] + slope[1] * (2 * at - 1))[..., None]
    factor = _FINE // size
    picture = picture.reshape(size, factor, size, factor, 3).mean((1, 3))
    picture = np.rint(127.5 * (np.clip(picture, -1, 1) + 1)).astype(np.uint8)
    article = "an" if HUES[hue][0] in "aeiou" else "a"
    on = "an" if HUES[ground][0] in "aeiou" else "a"
    return picture, f"{article} {HUES[hue]} {shape} on {on} {HUES[ground]} ground"


def write(folder: pathlib.Path, count: int) -> None:
    """Pictures and captions as `prepare --source=folder:FOLDER` takes them."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(count):
            picture, caption = draw(i)
            pictures.save(folder / f"{i:05}.png", picture)
            file.write(json.dumps({"file_name": f"{i:05}.png", "text": caption}) + "\n")


def _hue(across: np.ndarray) -> str:
    angle = np.rad2deg(np.arctan2(across[1], across[0]))
    return HUES[round(angle / 30) % 12]


def _colours(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of ground and shape, across the grey axis, and each pixel's off the ground."""
    across = (picture / 127.5 - 1) @ _ACROSS.T
    edge = np.ones(across.shape[:2], bool)
    edge[1:-1, 1:-1] = False
    ground = np.median(across[edge], 0)
    off = across - ground
    distance = np.hypot(*np.moveaxis(off, -1, 0))
    strong = distance >= 0.75 * np.quantile(distance, 0.96)
    return ground, ground + np.median(off[strong], 0), off


def look(picture: np.ndarray) -> tuple[str, str, str]:
    """Hue of the shape, the shape, and hue of the ground, of a picture `[H, W, 3]`.

    Brightness and how strong a hue is do not count. Without a second hue, and
    without any, the names are empty.
    """
    ground, colour, off = _colours(picture)
    below = "" if np.hypot(*ground) < 0.05 else _hue(ground)
    other = colour - ground
    size = np.hypot(*other)
    if size < 0.1:
        return "", "", below
    alpha = np.clip(off @ other / size**2, 0, 1)
    alpha[alpha < 0.25] = 0
    hue = "" if np.hypot(*colour) < 0.05 else _hue(colour)
    return hue, fit_shape(alpha)[0], below


def muted(made: np.ndarray) -> tuple[float, float]:
    """Shares of pictures with a shape, a ground whose hue is no stronger than drawn.

    A tenth more is allowed.
    """
    colours = [_colours(picture)[1::-1] for picture in made]
    within = np.linalg.norm(colours, axis=-1) < 1.1 * _CHROMA[1]
    return tuple(within.mean(0))


def captions(count: int) -> list[str]:
    """Of pictures that `write` does not write."""
    return [draw(100_000 + i)[1] for i in range(count)]


def accuracy(made: np.ndarray, asked: Sequence[str]) -> tuple[float, float, float]:
    """Shares of pictures with the right hue of the shape, shape, hue of the ground."""
    seen = np.array([look(picture) for picture in made])
    words = np.array([caption.split() for caption in asked])
    return tuple((seen == words[:, [1, 2, 5]]).mean(0))
