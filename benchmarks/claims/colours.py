"""The world of colours as people name them: one shape on grey, as "a dusty teal ring".

Its 949 names are of a survey (xkcd.txt). 150 of them are never trained on, and some of
these have a word that no trained name has: then only the text encoder can know it.
"""

import functools
import pathlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from imagen_jax.shapes import scenes

HELD_OUT = 150
# Names that are asked of those that are trained on.
ASKED_TRAINED = 150
# Painted colours are right when the name is among so many nearest of the 150.
NEAREST = 10
_GREY = 127
_RADIUS = 0.4  # of the picture's side; all shapes lie in the middle

# Linear sRGB to XYZ of CIE 1931, and the white of D65 (IEC 61966-2-1).
_XYZ = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


@functools.cache
def named() -> dict[str, tuple[int, int, int]]:
    """The colour in [0, 255] of each name of the survey."""
    lines = pathlib.Path(__file__).with_name("xkcd.txt").read_text().splitlines()
    found = (line.split(" ", 1) for line in lines if not line.startswith("# "))
    return {name: tuple(bytes.fromhex(colour[1:])) for colour, name in found}


@functools.cache
def kinds() -> dict[str, tuple[str, ...]]:
    """Names by what was trained on: as the keys of `prompts`, and all "learnt" ones.

    By the checksums of the names: those of the lowest 150 are never trained on, those
    of the next 150 are asked of the others.
    """
    order = sorted(named(), key=lambda name: zlib.crc32(name.encode()))
    held, learnt = order[:HELD_OUT], order[HELD_OUT:]
    known = {word for name in learnt for word in _words(name)}
    return {
        "learnt": tuple(learnt),
        "trained": tuple(learnt[:ASKED_TRAINED]),
        "names": tuple(name for name in held if set(_words(name)) <= known),
        "words": tuple(name for name in held if not set(_words(name)) <= known),
    }


def _words(name: str) -> list[str]:
    return name.replace("/", " ").split()


def caption(name: str, shape: str) -> str:
    """As "an aqua ring"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} {shape}"


def draw(colour: Sequence[int], shape: str, size: int) -> np.ndarray:
    """A shape in the middle, `[size, size, 3]` uint8, anti-aliased."""
    alpha = _coverage(shape, size)[..., None]
    return np.rint(_GREY + alpha * (np.float64(colour) - _GREY)).astype(np.uint8)


@functools.cache
def _coverage(shape: str, size: int) -> np.ndarray:
    fine = 8 * size
    at = np.arange(fine) + 0.5 - fine / 2
    alpha = scenes.coverage(shape, at[None, :], at[:, None], _RADIUS * fine)
    return alpha.reshape(size, 8, size, 8).mean((1, 3))


def examples(size: int) -> Iterator[tuple[np.ndarray, str]]:
    """Every trained name in every shape: a picture and its caption."""
    for name in kinds()["learnt"]:
        for shape in scenes.SHAPES:
            yield draw(named()[name], shape, size), caption(name, shape)


def prompts(each: int) -> Iterator[tuple[str, str, str]]:
    """`(kind, name, shape)` of what is asked: each name with `each` of the shapes.

    The kind is "trained", "names" (new ones of known words) or "words" (of a new word).
    """
    for kind in ("trained", "names", "words"):
        for i, name in enumerate(kinds()[kind]):
            for k in range(each):
                yield kind, name, scenes.SHAPES[(i + k) % len(scenes.SHAPES)]


def painted(picture: np.ndarray, shape: str) -> np.ndarray:
    """The median colour `[3]`, in [0, 255], where the asked shape covers pixels."""
    inside = _coverage(shape, picture.shape[0]) > 0.99
    return np.median(picture[inside], axis=0)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB in [0, 255], under D65 and for 2 degrees, `[..., 3]`.

    Source: IEC 61966-2-1 and CIE 15.
    """
    value = np.asarray(rgb, np.float64) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    ratio = linear @ _XYZ.T / _WHITE
    low = ratio * (29 / 6) ** 2 / 3 + 4 / 29
    x, y, z = np.moveaxis(np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), low), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def judge(picture: np.ndarray, name: str, shape: str) -> dict[str, float]:
    """How well a picture shows a colour.

    Returns:
      "distance", between painted and named colour in CIELAB (CIE76); "near", whether
      the name is among the `NEAREST` to the painted colour, of the 150 that are asked
      with it.
    """
    groups = kinds()
    asked = groups["names"] + groups["words"]
    if name not in asked:
        asked = groups["trained"]
    found = lab(painted(picture, shape))
    distances = np.linalg.norm(_labs(asked) - found, axis=-1)
    own = distances[asked.index(name)]
    return {"distance": float(own), "near": float((distances < own).sum() < NEAREST)}


@functools.cache
def _labs(names: tuple[str, ...]) -> np.ndarray:
    return lab([named()[name] for name in names])
