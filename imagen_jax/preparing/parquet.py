"""Parquet files with the bytes of images and their captions."""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.sources import (
    CAPTIONS,
    USUAL,
    Conventions,
    Example,
    Problem,
    Rest,
    Source,
)

# The columns of Hugging Face's `datasets` and img2dataset, then what others use.
_IMAGES = ("image", "jpg", "png", "webp", "image_bytes", "img")


def _maybe_dictionary(kind: str) -> str:
    return rf"({kind}|dictionary<values={kind}, indices=\w+, ordered=\d>)"


# Arrow's names of their types.
_BYTES = _maybe_dictionary(r"(large_)?binary(_view)?")
_TEXT = _maybe_dictionary(r"(large_)?string(_view)?")
_IS_IMAGE = rf"{_BYTES}|struct<.*\bbytes: {_BYTES}.*>"
_IS_CAPTION = (
    rf"{_TEXT}|(large_|fixed_size_)?list(_view)?<\w+: {_TEXT}( not null)?>(\[\d+\])?"
)
# Rows in memory at a time.
ROWS = 64


def open_parquet(pattern: str, size: int, how: Conventions = USUAL) -> Source:
    """The rows of the files that match `pattern`; `size` rows of a file make a shard.

    An image is a binary column or a struct with `bytes`, a caption a string or a list
    of n strings, of which number `id % n` is taken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    problems, shards, count, lengths, times = [], [], 0, [], []
    for file in sources.matching_files(pattern, "Parquet file", "*.parquet"):
        name = os.path.basename(file)
        try:
            stat = os.stat(file)
            times.append(stat.st_mtime_ns)
            with pq.ParquetFile(file) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            problems.append(Problem(name, _brief(error)))
            continue
        columns = find_columns(schema, file, how)
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            shards.append((file, columns, start, stop, count + start, how))
        lengths.append((name, stat.st_size, rows))
        count += rows
    sha256 = sources.sha256_of(lengths)
    read = lambda i: _read(*shards[i])  # noqa: E731
    # Nobody knows how many rows a file has that cannot be opened.
    rest = Rest(count + len(problems))
    return Source(len(shards), read, count, problems, sha256, times, rest)


def find_columns(schema: Any, where: str, how: Conventions) -> list[str]:
    """The column of images and, unless there are no captions, that of captions."""
    images = (how.image_column,) if how.image_column else _IMAGES
    captions = (how.caption_column,) if how.caption_column else CAPTIONS
    columns = [_column(schema, where, "pictures", "image", images, _IS_IMAGE)]
    if not how.no_captions:
        columns += [
            _column(schema, where, "captions", "caption", captions, _IS_CAPTION)
        ]
    return columns


def _column(schema, where: str, what: str, flag: str, names: tuple, kind: str) -> str:
    """The first of `names` whose column has a type that matches `kind`."""
    types = {name: str(type_) for name, type_ in zip(schema.names, schema.types)}
    for name in names:
        if re.fullmatch(kind, types.get(name, "")):
            return name
    there = ", ".join(f"{name} ({type_})" for name, type_ in types.items())
    raise UserError(
        f"{where!r} has no column of {what} ({', '.join(names)}), but {there}: name it "
        f"with --{flag}_column"
    )


def _read(file, columns, start, stop, first_id, how) -> Iterator[Example | Problem]:
    """Rows [start, stop) of a file; `first_id` is the id of row `start`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file_name = os.path.basename(file)
    row, reason = start, "the file ends before it"
    try:
        with pq.ParquetFile(file) as parquet:
            groups = range(parquet.num_row_groups)
            lengths = [parquet.metadata.row_group(group).num_rows for group in groups]
            ends = np.cumsum(lengths)
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            row = int(ends[first]) - lengths[first]
            for batch in parquet.iter_batches(ROWS, groups[first : last + 1], columns):
                for values in zip(*map(batch.column, columns)):
                    if start <= row < stop:
                        id = first_id + row - start
                        yield make_row(id, f"{file_name}/{row}", values, how)
                    row += 1
                if row >= stop:
                    return
    except (pa.ArrowException, OSError) as error:
        reason = _brief(error)
    row = max(row, start)
    reason = f"{reason}; rows {row} to {stop - 1} are lost"
    yield Problem(f"{file_name}/{row}", reason, stop - row)


def make_row(
    id: int, name: str, values: tuple, how: Conventions, follow_paths: bool = False
) -> Example | Problem:
    """The example of a row: an image, and a caption unless there are none.

    With `follow_paths` an image may also be a struct with the `path` of its file.
    """
    data, *captions = map(_value, values)
    path = ""
    if not data and follow_paths and values[0].is_valid:
        path = values[0].as_py().get("path") or ""
        if path and not os.path.isfile(path):
            return Problem(name, f"its picture {path!r} is no file")
    if not (data or path):
        return Problem(name, "has no picture")
    read = pathlib.Path(path).read_bytes if path else lambda: data
    return sources.make_example(
        id, name, captions[0] if captions else "", read, how=how
    )


def _value(scalar: Any) -> bytes | list | None:
    """The bytes of a scalar, of the struct of an image, or of each in a list.

    Of strings as well: Arrow does not check that they are UTF-8.
    """
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.DictionaryScalar):
        return _value(scalar.value)
    if isinstance(scalar, pa.StructScalar):
        return _value(scalar["bytes"])
    if isinstance(scalar, pa.ListScalar):
        return [_value(own) for own in scalar.values]
    return scalar.as_buffer().to_pybytes()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
