"""Parquet files with the bytes of images and their captions."""

import os
import re
from collections.abc import Iterator

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.sources import Example, Problem, Source

# The columns of Hugging Face's `datasets` and img2dataset, then what others use.
_IMAGES = ("image", "jpg", "png", "webp", "image_bytes", "img")
_CAPTIONS = ("caption", "text", "TEXT", "captions", "txt", "prompt")
# Arrow's names of their types.
_IS_IMAGE = r"(large_)?binary|struct<.*\bbytes: (large_)?binary\b.*>"
_IS_CAPTION = r"(large_)?string|(large_)?list<\w+: (large_)?string( not null)?>"
# Rows in memory at a time.
_ROWS = 64


def open_parquet(pattern: str, size: int) -> Source:
    """The rows of the files that match `pattern`; `size` rows of a file make a shard.

    An image is a binary column or a struct with `bytes`, a caption a string or a list
    of strings. Files that are not Parquet are problems.

    Raises:
      UserError: when no file matches or can be read, or a file has no such columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    problems, shards, count, lengths = [], [], 0, []
    for file in sources.matching_files(pattern, "Parquet file"):
        name = os.path.basename(file)
        try:
            with pq.ParquetFile(file) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            problems.append(Problem(name, _brief(error)))
            continue
        columns = _columns(schema, file)
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            shards.append((file, columns, start, stop, count + start))
        lengths.append((name, os.path.getsize(file), rows))
        count += rows
    if not shards:
        reason = f": {problems[0].name}: {problems[0].reason}" if problems else ""
        raise UserError(f"no file that matches {pattern!r} has rows{reason}")
    return Source(
        len(shards),
        lambda shard: _read(*shards[shard]),
        count,
        problems,
        sources.sha256_of(lengths),
    )


def _columns(schema, file: str) -> list[str]:
    """The names of the image's and the caption's column."""
    types = {name: str(kind) for name, kind in zip(schema.names, schema.types)}
    columns = []
    for what, names, pattern in (
        ("the bytes of pictures", _IMAGES, _IS_IMAGE),
        ("captions", _CAPTIONS, _IS_CAPTION),
    ):
        fitting = [n for n in names if re.fullmatch(pattern, types.get(n, ""))]
        if not fitting:
            raise UserError(
                f"{file!r} has no column with {what} ({', '.join(names)}); it has "
                f"{', '.join(f'{n} ({t})' for n, t in types.items())}"
            )
        columns.append(fitting[0])
    return columns


def _read(file, columns, start, stop, first_id) -> Iterator[Example | Problem]:
    """Rows [start, stop) of a file; `first_id` is the id of row `start`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file_name = os.path.basename(file)
    row = start
    try:
        with pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata
            groups = range(metadata.num_row_groups)
            ends = np.cumsum([metadata.row_group(group).num_rows for group in groups])
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            row = int(ends[first - 1]) if first else 0
            for batch in parquet.iter_batches(_ROWS, groups[first : last + 1], columns):
                for image, caption in zip(*map(batch.column, columns)):
                    if start <= row < stop:
                        id = first_id + row - start
                        yield _example(id, f"{file_name}/{row}", image, caption)
                    row += 1
                if row >= stop:
                    return
    except (pa.ArrowException, OSError) as error:
        row = max(row, start)
        reason = f"{_brief(error)}; rows {row} to {stop - 1} are lost"
        yield Problem(f"{file_name}/{row}", reason)


def _example(id: int, name: str, image, caption) -> Example | Problem:
    import pyarrow as pa

    if pa.types.is_struct(image.type) and image.is_valid:
        image = image["bytes"]
    data = image.as_py()
    if not data:
        return Problem(name, "has no picture")
    if isinstance(caption, pa.ListScalar):
        caption = sources.choose_caption(list(caption.values or []), id)
    # As bytes: Arrow does not check that a string is UTF-8.
    text = caption.as_buffer().to_pybytes() if caption and caption.is_valid else b""
    return sources.make_example(id, name, text, lambda: data)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
