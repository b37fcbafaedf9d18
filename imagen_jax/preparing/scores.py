"""Numbers that other programs, or a function of the user's, give to pictures."""

import array
import collections
import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.files import read_rows
from imagen_jax.images import opened
from imagen_jax.preparing.images import StoredImage
from imagen_jax.preparing.sources import Example

# Columns that name the picture; without one of them the first column does.
_KEYS = ("file", "file_name", "name", "id")
_KINDS = (".csv", ".jsonl", ".parquet")
# Names of scores are keys of records, and words of `data.filter`.
_IS_NAME = re.compile(r"\w[\w .:-]*").fullmatch
# A picture `[H, W, 3]` uint8 as it is stored, and its caption, to numbers by name.
ScoreFunction = Callable[[np.ndarray, str], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Where the scores of examples come from."""

    identity: str  # changes when they do
    # The scores of an example by name, NaN where it has none.
    of: Callable[[Example, StoredImage], dict[str, float]]
    pictures: Sequence[str] = ()  # names or ids of those in a table
    faults: Sequence[str] = ()  # a line for each column with values that are no numbers


def read_scores(file: str) -> Scores:
    """The scores in a table; a row names its picture as the source does, or by id."""
    path = pathlib.Path(file)
    if path.suffix not in _KINDS:
        raise UserError(f"--scores is {file!r}; give a file {', '.join(_KINDS)}")
    places, columns = {}, {}
    first, wrong = {}, collections.Counter()
    for number, row in _rows(path):
        key = next((name for name in _KEYS if name in row), next(iter(row), None))
        if None in (key, *row):  # `csv` has there what is too much
            raise UserError(f"{file} line {number} has no values, or too many")
        picture, place = str(row.pop(key)), len(places)
        if places.setdefault(picture, place) < place:
            raise UserError(f"{file} line {number} names {picture!r} a second time")
        for name, value in row.items():
            column = columns.setdefault(name, array.array("f"))
            column.extend([math.nan] * (place - len(column)))
            column.append(_number(value))
            if math.isnan(column[-1]) and value not in (None, ""):
                first.setdefault(name, f"{value!r} in line {number}")
                wrong[name] += 1
    for column in columns.values():
        column.extend([math.nan] * (len(places) - len(column)))
    scores = {n: own for n, own in columns.items() if not all(map(math.isnan, own))}
    if not scores:
        raise UserError(f"{file} has no column of numbers beside the pictures' names")
    _check_names(scores, file)
    faults = [
        f"{count:,} values of {name!r} in {file} are no numbers, first {first[name]}"
        for name, count in wrong.items()
    ]

    def of(example: Example, image: StoredImage) -> dict[str, float]:
        place = places.get(example.name, places.get(str(example.id)))
        return {n: math.nan if place is None else s[place] for n, s in scores.items()}

    with path.open("rb") as table:
        identity = hashlib.file_digest(table, "sha256").hexdigest()
    return Scores(identity, of, list(places), faults)


def _rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """The rows of a table, with their numbers."""
    if path.suffix != ".parquet":
        yield from read_rows(path, "scores", path.suffix[1:])
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def _number(value: Any) -> float:
    """A number that float32 can hold, or NaN for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < 3e38 else math.nan


def _check_names(names: Mapping[str, Any], where: str) -> None:
    for name in names:
        if not (isinstance(name, str) and _IS_NAME(name)):
            raise UserError(f"{where} has a score {name!r}: name it by letters")


def check_match(scores: Scores, items: Sequence[Any]) -> None:
    """Raises `UserError` if a table names no example among the first of a source."""
    first, known = [x for x in items if isinstance(x, Example)], set(scores.pictures)
    if first and not any(known & {own.name, str(own.id)} for own in first):
        raise UserError(
            f"--scores name none of the first {len(first)} pictures: one is "
            f"{first[0].name!r} (or {first[0].id}), there is {scores.pictures[0]!r}"
        )


def scores_by(function: ScoreFunction) -> Scores:
    """The scores that a function returns for each picture, with the same names."""
    names = []

    def of(example: Example, image: StoredImage) -> dict[str, float]:
        with opened(image.data) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        found = function(pixels, example.caption)
        scores = {name: _number(value) for name, value in found.items()}
        names[:] = names or scores
        _check_names(scores, f"the function for {example.name!r}")
        if scores.keys() != set(names):
            raise UserError(
                f"the scores of {example.name!r} are {', '.join(scores)}, those of "
                f"pictures before it {', '.join(names)}: give all the same, NaN if none"
            )
        return scores

    name = getattr(function, "__qualname__", type(function).__qualname__)
    return Scores(f"{function.__module__}.{name}", of)
