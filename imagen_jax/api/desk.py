"""Requests of several users to one cascade, which are done one after the other."""

import concurrent.futures
import dataclasses
import functools
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from imagen_jax import images
from imagen_jax.api.library import Cascade
from imagen_jax.errors import UserError

# What users set for each stage, in the order of their values.
SETTINGS = ("guidance", "steps", "sampler", "threshold", "aug_level")
# Pictures of a sheet, of one row of it, and of a history.
_SHEET, _COLUMNS, _HISTORY = 8, 4, 24
# A picture that is being made is shown so often, at most so large.
_SECONDS, _SHOWN_SIDE = 0.5, 256
# Of a picture to enlarge. Phones take 50 million.
_MOST_PIXELS = 64_000_000


@dataclasses.dataclass(frozen=True)
class Made:
    """A picture of a user's history."""

    path: str
    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a request shows while it runs, and at its end."""

    # Of each stage the image `[H, W, 3]` uint8, the path of a file, or None: not yet.
    pictures: Sequence[np.ndarray | str | None]
    status: str
    seed: int
    sheet: np.ndarray | None = None
    history: list[Made] | None = None  # the newest first; None: as it was


class _Left(Exception):
    """Whoever asked has left."""


def checked(prompt: str | None, most_chars: int) -> str:
    """A prompt without spaces around it, or `UserError`."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise UserError("write a prompt first")
    if len(prompt) > most_chars:
        raise UserError(
            f"the prompt has {len(prompt):,} characters: at most {most_chars:,} are "
            "taken"
        )
    return prompt


def chosen(seed: float | None, is_new: bool) -> int:
    """The seed that a user wrote, or a new one; `UserError` if it is none."""
    if is_new:
        return secrets.randbelow(2**32)
    if seed is None or not 0 <= seed < 2**32:
        raise UserError("a seed is a whole number from 0 to 4,294,967,295")
    return int(seed)


def weights(text: str | None) -> list[float]:
    """The guidance weights of a sheet, "1, 2, 4", or `UserError`."""
    try:
        found = [float(word) for word in (text or "").replace(",", " ").split()]
    except ValueError:
        found = []
    if not 0 < len(found) <= _SHEET:
        raise UserError(f"give up to {_SHEET} weights with commas between them")
    return found


def settings(values: Sequence[Any]) -> dict[str, list[Any]]:
    """All stages' values by the names of `SETTINGS`; None is the stage's own."""
    return {name: list(values[i :: len(SETTINGS)]) for i, name in enumerate(SETTINGS)}


def read_picture(path: str | None) -> bytes:
    """The file of a picture to enlarge, or `UserError`; nothing of it is decoded."""
    data = pathlib.Path(path).read_bytes() if path else b""
    if not data:
        raise UserError("give a picture first; this file is empty")
    try:
        with images.opened(data) as image:
            width, height = image.size
    except images.Unusable as error:
        raise UserError(f"this file cannot be used: {error}") from None
    if width * height > _MOST_PIXELS:
        raise UserError(
            f"this picture has {width:,} x {height:,} pixels: at most "
            f"{_MOST_PIXELS // 10**6} million are taken"
        )
    return data


def reduced(image: np.ndarray) -> np.ndarray:
    """An image `[H, W, 3]` uint8 with sides of at most 256."""
    times = -(-max(image.shape) // _SHOWN_SIDE)
    return np.asarray(Image.fromarray(image).reduce(times))


class Desk:
    """Takes requests, and has a cascade do them in their order.

    A request is a generator of `Shown`. It raises `UserError` for what its user can
    mend. One that is closed before its turn is not done, and one that is at work then
    ends with its stage.
    """

    def __init__(self, cascade: Cascade, folder: str, most_chars: int = 500):
        """Keeps finished pictures in `folder`, and copies for users in `served`.

        Prompts may have `most_chars` characters.
        """
        self.cascade, self.most_chars = cascade, most_chars
        self.folder = pathlib.Path(folder)
        self.served = self.folder / "served"
        self.served.mkdir(parents=True, exist_ok=True)
        self._none = [None] * len(cascade.config)
        self._worker = concurrent.futures.ThreadPoolExecutor(1)

    def generate(self, prompt, seed, is_new, history, *values) -> Iterator[Shown]:
        """A picture of a prompt, in all stages; `values` are those of `settings`."""
        prompt, seed = checked(prompt, self.most_chars), chosen(seed, is_new)
        make = functools.partial(self.cascade.sample, prompt, return_stages=True)
        result = yield from self._run(make, seed, settings(values))
        pictures = [stage[0] for stage in result.stages]
        file = images.png(pictures[-1], result.about[0])
        yield self._finished(pictures, file, prompt, seed, history)

    def enlarge(self, path, prompt, seed, is_new, history, *values) -> Iterator[Shown]:
        """The picture in a file, enlarged by the super-resolution stages."""
        prompt, seed = checked(prompt, self.most_chars), chosen(seed, is_new)
        make = functools.partial(self.cascade.upscale, read_picture(path), prompt)
        made = yield from self._run(make, seed, settings(values))
        yield self._finished(self._none, images.png(made), prompt, seed, history)

    def compare(self, text, prompt, seed, is_new, history, *values) -> Iterator[Shown]:
        """A sheet of one prompt and seed, with other guidance of the first stage."""
        prompt, seed = checked(prompt, self.most_chars), chosen(seed, is_new)
        found, made, given = weights(text), [], settings(values)
        make = functools.partial(self.cascade.sample, prompt)
        for weight in found:
            given["guidance"][0] = weight
            result = yield from self._run(make, seed, given)
            made.append(result.images[0])
            side = len(made[0])
            sheet = images.grid(
                images.enlarge(np.stack(made), side * max(1, 96 // side)),
                min(_COLUMNS, len(found)),
                [f"w {w:g}" for w in found[: len(made)]],
                title=f"{prompt}, seed {seed}",
            )
            status = f"{len(made)} of {len(found)} weights, seed {seed}"
            yield Shown(self._none, status, seed, sheet)

    def _run(self, make: Callable, seed: int, how: dict[str, Any]) -> Iterator[Shown]:
        """Has `make` done in its turn, and shows estimates; returns what it made."""
        seen: dict[int, tuple[int, np.ndarray]] = {}
        has_left = False

        def note(stage: int, step: int, estimate: np.ndarray) -> None:
            if has_left:
                raise _Left
            seen[stage] = step, estimate[0]

        job = self._worker.submit(make, seed=seed, callback=note, **how)
        try:
            while not job.done():
                concurrent.futures.wait([job], _SECONDS)
                pictures, status = list(self._none), "waiting for the first step"
                for stage, (step, estimate) in sorted(seen.items()):
                    pictures[stage] = reduced(estimate)
                    status = f"stage {stage + 1} of {len(pictures)}, step {step + 1}"
                yield Shown(pictures, status, seed)
        finally:
            has_left = not job.done()
            job.cancel()
        return job.result()

    def _finished(self, pictures, file, prompt, seed, history) -> Shown:
        """Keeps the last stage's picture, a PNG file, and heads the history with it."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}.png"
        for path in (self.folder / name, self.served / name):
            path.write_bytes(file)
        kept = [Made(str(path), prompt, seed), *(history or [])][:_HISTORY]
        last = str(path)
        return Shown([*pictures[:-1], last], f"seed {seed}", seed, history=kept)
