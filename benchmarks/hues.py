"""Captioned pictures that lie in their range as photographs do, and a judge of them.

A sky over a sea. Everything is muted and in the middle of the range: the caption names
two of twelve hues, and chroma, brightness, horizon, waves and the fall of the light are
left open. So guidance moves every pixel, and what it moves has room to be burnt out.
The demo's drawings are mostly white paper, which is at the end of the range and stays.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from imagen_jax import images as pictures

# Every 30 degrees of the hue circle, from red. The cube's corners are every other one.
HUES = "red orange yellow lime green mint cyan azure blue violet magenta rose".split()
# Unit vectors across the grey axis: towards red, and 90 degrees on towards lime.
ACROSS = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]]) / 6**0.5
# Of values in [-1, 1]. The largest sum is 1.13.
_CHROMA = (0.25, 0.6)
_BRIGHTNESS = 0.3
_LIGHT = 0.15
_WAVES = 0.05
_JITTER = 8  # degrees
_FINE = 64


def _colour(rng, hue: int) -> np.ndarray:
    angle = np.deg2rad(30 * hue + rng.uniform(-_JITTER, _JITTER))
    across = np.array([np.cos(angle), np.sin(angle)]) @ ACROSS
    return rng.uniform(*_CHROMA) * across + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)


def draw(seed: int, size: int = 16) -> tuple[np.ndarray, str]:
    """A picture `[size, size, 3]` uint8 and its caption.

    The hues of sky and sea are at least 60 degrees apart. The horizon is in the middle
    half of the picture.
    """
    rng = np.random.default_rng((seed, 8))
    sky = int(rng.integers(12))
    sea = (sky + int(rng.integers(2, 11))) % 12
    at = (np.arange(_FINE) + 0.5) / _FINE
    x, y = at[None, :, None], at[:, None, None]
    horizon = rng.uniform(0.35, 0.65) + rng.uniform(-0.1, 0.1) * (x - 0.5)
    below = np.clip(16 * (y - horizon) + 0.5, 0, 1)
    picture = below * _colour(rng, sea) + (1 - below) * _colour(rng, sky)
    slope = rng.uniform(-_LIGHT, _LIGHT, 2)
    picture = picture + slope[0] * (2 * y - 1) + slope[1] * (2 * x - 1)
    across, down, phase = rng.uniform(-4, 4, 3)
    waves = np.cos(2 * np.pi * (across * x + down * y + phase))
    picture = picture + _WAVES * waves
    factor = _FINE // size
    picture = picture.reshape(size, factor, size, factor, 3).mean((1, 3))
    picture = np.rint(127.5 * (np.clip(picture, -1, 1) + 1)).astype(np.uint8)
    return picture, f"{_article(sky)} sky over {_article(sea)} sea"


def _article(hue: int) -> str:
    return f"{'an' if HUES[hue][0] in 'aeiou' else 'a'} {HUES[hue]}"


def write(folder: pathlib.Path, count: int) -> None:
    """Pictures and captions as `prepare --source=folder:FOLDER` takes them."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(count):
            picture, caption = draw(i)
            pictures.save(folder / f"{i:05}.png", picture)
            file.write(json.dumps({"file_name": f"{i:05}.png", "text": caption}) + "\n")


def captions(count: int) -> list[str]:
    """Of pictures that `write` does not write."""
    return [draw(100_000 + i)[1] for i in range(count)]


def _colours(made: np.ndarray) -> np.ndarray:
    """Of skies and seas across the grey axis, `[B, 2, 2]`: the outer quarters."""
    across = (made / 127.5 - 1) @ ACROSS.T
    quarter = made.shape[1] // 4
    parts = across[:, :quarter], across[:, -quarter:]
    return np.stack([np.median(part, (1, 2)) for part in parts], 1)


def right(made: np.ndarray, asked: Sequence[str]) -> np.ndarray:
    """`[B, 2]`: whether sky and sea of pictures `[B, H, W, 3]` have the asked hues.

    Brightness and how strong a hue is do not count; next to grey there is none.
    """
    colours = _colours(made)
    angles = np.rad2deg(np.arctan2(colours[..., 1], colours[..., 0]))
    seen = np.array(HUES)[np.rint(angles / 30).astype(int) % 12]
    words = np.array([caption.split() for caption in asked])[:, [1, 5]]
    return (seen == words) & (np.linalg.norm(colours, axis=-1) > 0.05)


def as_drawn(made: np.ndarray) -> np.ndarray:
    """`[B, 2]`: whether hues of sky and sea are as strong as drawn, to a tenth."""
    chroma = np.linalg.norm(_colours(made), axis=-1)
    return (chroma > 0.9 * _CHROMA[0]) & (chroma < 1.1 * _CHROMA[1])
