"""Numbers that other programs, or a function of the user's, give to pictures."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.images import opened
from imagen_jax.preparing.images import StoredImage
from imagen_jax.preparing.sources import Example

# Columns that name the picture; without one of them the first column does.
_KEYS = ("file", "file_name", "name", "id")
# A picture `[H, W, 3]` uint8 as it is stored, and its caption, to numbers by name.
ScoreFunction = Callable[[np.ndarray, str], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Where the scores of examples come from: from nowhere by default."""

    identity: str = ""  # changes when they do
    # Numbers by name, NaN where there is none.
    of: Callable[[Example, StoredImage], dict[str, float]] = lambda example, image: {}
    pictures: Sequence[str] = ()  # names or ids of those in a table
    faults: Sequence[str] = ()  # what is no score, a line each


def open_scores(scores: str | ScoreFunction) -> Scores:
    """Those of a table's path or of a function; "" for none."""
    if callable(scores):
        return _by_function(scores)
    return _read(scores) if scores else Scores()


def _read(file: str) -> Scores:
    """Of a table, whose rows name pictures as their source does, or by id."""
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    kind = pathlib.Path(file).suffix
    readers = {".csv": csv.read_csv, ".jsonl": json.read_json}
    readers[".parquet"] = parquet.read_table
    if kind not in readers:
        raise UserError(f"--scores is {file!r}; give a file {', '.join(readers)}")
    try:
        table = readers[kind](file)
        identity = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--scores={file} cannot be read: {error}") from None
    key = next((n for n in _KEYS if n in table.column_names), table.column_names[0])
    pictures = list(map(str, table[key].to_pylist()))
    places = {picture: place for place, picture in enumerate(pictures)}
    if len(places) < len(pictures):
        raise UserError(f"--scores={file} names some pictures twice")
    scores, faults = {}, []
    for name in table.drop_columns(key).column_names:
        try:
            numbers = table[name].cast(pa.float32(), safe=False).to_numpy()
        except (pa.ArrowException, KeyError) as error:
            faults.append(f"{name!r} in {file} is no score: {error}")
            continue
        known = np.isfinite(numbers)
        if "/" not in name and known.any():
            scores[name] = np.where(known, numbers, np.nan)
        else:
            faults.append(f"{name!r} in {file} is no score: no number, or a / in it")
    if not scores:
        raise UserError(
            f"--scores={file} has no column of numbers: {'; '.join(faults)}"
        )

    def of(example: Example, image: StoredImage) -> dict[str, float]:
        place = places.get(example.name, places.get(str(example.id)))
        if place is None:
            return dict.fromkeys(scores, math.nan)
        return {name: float(numbers[place]) for name, numbers in scores.items()}

    return Scores(identity, of, pictures, faults)


def _by_function(function: ScoreFunction) -> Scores:
    """What a function returns for each picture, always by the same names."""
    names = []

    def of(example: Example, image: StoredImage) -> dict[str, float]:
        with opened(image.data) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        scores = {n: float(x) for n, x in function(pixels, example.caption).items()}
        names[:] = names or scores
        if scores.keys() != set(names):
            raise UserError(
                f"the scores of {example.name!r} are {', '.join(scores)}, those before "
                f"are {', '.join(names)}: give all the same, NaN if there is none"
            )
        return scores

    return Scores(getattr(function, "__qualname__", type(function).__name__), of)


def check_match(scores: Scores, items: Iterable[Any]) -> None:
    """Raises `UserError` if a table names no example among `items` of a source."""
    if not (known := set(scores.pictures)):
        return
    first = [item for item in items if isinstance(item, Example)]
    if first and not any(known & {own.name, str(own.id)} for own in first):
        raise UserError(
            f"--scores name none of the first {len(first)} pictures: one is "
            f"{first[0].name!r} (or {first[0].id}), there is {scores.pictures[:1]}"
        )
