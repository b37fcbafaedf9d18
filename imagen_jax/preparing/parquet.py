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
    of n strings, of which number `id % n` is taken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    problems, shards, count, lengths, times = [], [], 0, [], []
    for file in sources.matching_files(pattern, "Parquet file"):
        name = os.path.basename(file)
        try:
            stat = os.stat(file)
            times.append(stat.st_mtime_ns)
            with pq.ParquetFile(file) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            problems.append(Problem(name, _brief(error)))
            continue
        columns = [
            _column(schema, file, "column of pictures", _IMAGES, _IS_IMAGE),
            _column(schema, file, "column of captions", _CAPTIONS, _IS_CAPTION),
        ]
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            shards.append((file, columns, start, stop, count + start))
        lengths.append((name, stat.st_size, rows))
        count += rows
    sha256 = sources.sha256_of(lengths)
    read = lambda i: _read(*shards[i])  # noqa: E731
    return Source(len(shards), read, count, problems, sha256, times)


def _column(schema, file: str, what: str, names: tuple[str, ...], kind: str) -> str:
    """The first of `names` whose column has a type that matches `kind`."""
    types = {name: str(type_) for name, type_ in zip(schema.names, schema.types)}
    for name in names:
        if re.fullmatch(kind, types.get(name, "")):
            return name
    there = ", ".join(f"{name} ({type_})" for name, type_ in types.items())
    raise UserError(f"{file!r} has no {what} ({', '.join(names)}), but {there}")


def _read(file, columns, start, stop, first_id) -> Iterator[Example | Problem]:
    """Rows [start, stop) of a file; `first_id` is the id of row `start`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file_name = os.path.basename(file)
    row = start
    try:
        with pq.ParquetFile(file) as parquet:
            groups = range(parquet.num_row_groups)
            lengths = [parquet.metadata.row_group(group).num_rows for group in groups]
            ends = np.cumsum(lengths)
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            row = int(ends[first]) - lengths[first]
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
        captions = list(caption.values or [])
        caption = captions[id % len(captions)] if captions else None
    # As bytes: Arrow does not check that a string is UTF-8.
    text = caption.as_buffer().to_pybytes() if caption and caption.is_valid else b""
    return sources.make_example(id, name, text, lambda: data)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
