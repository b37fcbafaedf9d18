"""Worlds to train on: what they show, what is asked of who learnt them, and how it is
judged.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.claims import colours
from imagen_jax import images
from imagen_jax.evaluation.distances import frechet, statistics
from imagen_jax.preparing.images import stored_square
from imagen_jax.shapes import scenes, wordings
from imagen_jax.shapes.judge import judge
from imagen_jax.shapes.scenes import Scene

# Scenes that are asked for are of this seed, and those of training of another.
_ASKED_SEED = 1000
_ASKED = 128
# Of 20 drawn scenes 3 show a relation.
_RELATED_DRAWN, _RELATED_ASKED = 80_000, 192
# Emoji that are asked for, and the side of the squares whose colours are compared.
_EMOJI_ASKED, _CELLS = 192, 4

Scores = dict[str, list[float | None]]


class Asked(NamedTuple):
    """A prompt, and what its picture is judged by."""

    kind: str  # "trained", "wordings", ...: figures are of one kind, or of all
    text: str
    about: Any


@dataclasses.dataclass(frozen=True)
class World:
    """Captioned pictures. Functions are given the folder of the pictures, if any."""

    name: str
    source: str  # of `prepare`; "folder:" stands for what `write` writes
    image_size: int  # side of the records' pictures
    text_length: int
    ask: Callable[[pathlib.Path], list[Asked]]
    # Of pictures `[N, H, W, 3]` uint8: a list of N values by measure, None where a
    # caption does not ask for it; or of one, for a measure of all pictures.
    judge: Callable[[np.ndarray, Sequence[Asked], pathlib.Path], Scores]
    write: Callable[[pathlib.Path], None] | None = None
    # Low-resolution pictures to start from, one for each that is asked; else a base
    # makes them.
    start: Callable[[Sequence[Asked]], Iterable[np.ndarray]] | None = None


def write_folder(
    folder: pathlib.Path, examples: Iterable[tuple[np.ndarray, str]]
) -> None:
    """Writes pictures and captions for `--source=folder:`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (picture, caption) in enumerate(examples):
        name = f"{number:06d}.png"
        (folder / name).write_bytes(images.png(picture))
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def judge_scenes(
    pictures: np.ndarray, asked: Sequence[Asked], folder: pathlib.Path
) -> Scores:
    """What the demo's judge says of each aspect; `about` is the plain caption.

    "right" is colour and shape, "all" is all that the caption asks for, and "share" is
    how much of that is right.
    """
    found = []
    for picture, one in zip(pictures, asked, strict=True):
        verdict = dataclasses.asdict(judge(picture, one.about))
        asked_for = [value for value in verdict.values() if value is not None]
        verdict["right"] = verdict["colour"] and verdict["shape"]
        verdict["all"] = all(asked_for)
        verdict["share"] = sum(asked_for) / len(asked_for)
        found.append({k: None if v is None else float(v) for k, v in verdict.items()})
    return {name: [one[name] for one in found] for name in found[0]}


def _ask_wordings(folder: pathlib.Path) -> list[Asked]:
    drawn = list(scenes.generate(_ASKED, _ASKED_SEED))
    return [
        Asked(
            kind,
            wordings.say(scene, kind, np.random.default_rng((_ASKED_SEED, i))),
            scenes.caption(scene),
        )
        for kind in wordings.KINDS
        for i, scene in enumerate(drawn)
    ]


def _ask_plainly(asked: Iterable[Scene], kind: str) -> list[Asked]:
    captions = map(scenes.caption, asked)
    return [Asked(kind, caption, caption) for caption in captions]


def _ask_to_enlarge(folder: pathlib.Path) -> list[Asked]:
    drawn = scenes.heldout(96, _ASKED_SEED)
    return [Asked("new pairs", scenes.caption(scene), scene) for scene in drawn]


def _judge_enlarged(
    pictures: np.ndarray, asked: Sequence[Asked], folder: pathlib.Path
) -> Scores:
    """How near enlarged scenes are to the same drawn large.

    "error": the mean absolute difference, in levels of 255; "detail": the differences
    between neighbouring pixels, as a share of the drawn ones'.
    """
    size = pictures.shape[1]
    drawn = np.stack([scenes.draw(one.about, size) for one in asked]).astype(float)
    error = np.abs(pictures - drawn).mean((1, 2, 3))
    detail = _contrast(pictures.astype(float)) / _contrast(drawn)
    return {"error": error.tolist(), "detail": detail.tolist()}


def _contrast(pictures: np.ndarray) -> np.ndarray:
    steps = (np.abs(np.diff(pictures, axis=axis)).mean((1, 2, 3)) for axis in (1, 2))
    return sum(steps)


def _related(drawn: Iterable[Scene]) -> Iterable[Scene]:
    return (scene for scene in drawn if scene.relation)


def _write_relations(folder: pathlib.Path) -> None:
    drawn = _related(scenes.generate(_RELATED_DRAWN, seed=0))
    write_folder(folder, ((scenes.draw(s, 16), scenes.caption(s)) for s in drawn))


def _ask_relations(folder: pathlib.Path) -> list[Asked]:
    """Trained pairs of colour and shape: what is asked is which belong together."""
    drawn = _related(scenes.generate(10 * _RELATED_ASKED, _ASKED_SEED))
    return _ask_plainly(itertools.islice(drawn, _RELATED_ASKED), "trained pairs")


def _write_colours(folder: pathlib.Path) -> None:
    write_folder(folder, colours.examples(16))


def _ask_colours(folder: pathlib.Path) -> list[Asked]:
    return [
        Asked(kind, colours.caption(name, shape), (name, shape))
        for kind, name, shape in colours.prompts(each=2)
    ]


def _judge_colours(
    pictures: np.ndarray, asked: Sequence[Asked], folder: pathlib.Path
) -> Scores:
    found = [
        colours.judge(picture, *one.about)
        for picture, one in zip(pictures, asked, strict=True)
    ]
    return {name: [one[name] for one in found] for name in ("distance", "near")}


def _emoji(folder: pathlib.Path) -> list[dict[str, str]]:
    lines = (folder / "metadata.jsonl").read_text("utf8").splitlines()
    return [json.loads(line) for line in lines]


def _ask_emoji(folder: pathlib.Path) -> list[Asked]:
    """Captions that were trained on; `about` is the number of the emoji."""
    rows = _emoji(folder)
    count = min(_EMOJI_ASKED, len(rows))
    drawn = np.random.default_rng(0).choice(len(rows), count, replace=False)
    return [Asked("trained", rows[i]["text"], int(i)) for i in drawn]


def _colours_of_squares(pictures: np.ndarray) -> np.ndarray:
    """The mean colours of 4 x 4 squares in CIELAB, `[N, 48]`."""
    count, side = len(pictures), pictures.shape[1] // _CELLS
    found = colours.lab(pictures).reshape(count, _CELLS, side, _CELLS, side, 3)
    return found.mean((2, 4)).reshape(count, -1)


def _judge_emoji(
    pictures: np.ndarray, asked: Sequence[Asked], folder: pathlib.Path
) -> Scores:
    """How pictures fit their captions, and how they look beside all emoji.

    "found": whether the emoji of the caption is among the ten of all that are nearest,
    by the colours of squares; "chroma": by how much the mean chroma in CIELAB misses
    that of the emoji; "distance": the Fréchet distance of the colours of squares
    between the pictures and all emoji, one number.
    """
    size = pictures.shape[1]
    files = [folder / row["file_name"] for row in _emoji(folder)]
    real = np.stack([stored_square(file.read_bytes(), size) for file in files])
    own, every = _colours_of_squares(pictures), _colours_of_squares(real)
    numbers = [one.about for one in asked]
    away = np.linalg.norm(own[:, None] - every, axis=-1)
    rank = (away < away[np.arange(len(own)), numbers][:, None]).sum(1)
    chroma = [_chroma(each) for each in (pictures, real)]
    return {
        "found": (rank < 10).astype(float).tolist(),
        "chroma": np.abs(chroma[0] - chroma[1][numbers]).tolist(),
        "distance": [frechet(statistics(own), statistics(every))],
    }


def _chroma(pictures: np.ndarray) -> np.ndarray:
    return np.linalg.norm(colours.lab(pictures)[..., 1:], axis=-1).mean((1, 2))


WORDINGS = World("wordings", "wordings:20000", 16, 32, _ask_wordings, judge_scenes)
COLOURS = World(
    "colours", "folder:", 16, 16, _ask_colours, _judge_colours, _write_colours
)
RELATIONS = World(
    "relations", "folder:", 16, 24, _ask_relations, judge_scenes, _write_relations
)
SHAPES = World(
    "shapes",
    "shapes:20000",
    *(32, 16),
    lambda folder: _ask_plainly(scenes.heldout(192, _ASKED_SEED), "new pairs"),
    judge_scenes,
)
# Drawn scenes to be enlarged by a stage that was trained on SHAPES.
ENLARGED = dataclasses.replace(
    SHAPES,
    name="enlarged",
    ask=_ask_to_enlarge,
    judge=_judge_enlarged,
    start=lambda asked: (scenes.draw(one.about, 16) for one in asked),
)
# For what is told by training alone.
UNASKED = dataclasses.replace(SHAPES, ask=lambda folder: [])
# Its folder is the user's.
EMOJI = World("emoji", "folder:", 32, 16, _ask_emoji, _judge_emoji)
