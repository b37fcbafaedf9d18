"""Tables with images and captions: Parquet files, data sets of Hugging Face."""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import CAPTIONS, Example, Problem, Rest, Source

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
_ROWS = 64


def open_parquet(pattern: str, settings: Settings) -> Source:
    """The rows of the files that match `pattern`; no shard has rows of two files.

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
        columns = _columns(schema, file, settings)
        for start in range(0, rows, settings.shard_examples):
            stop = min(start + settings.shard_examples, rows)
            shards.append((settings, file, columns, start, stop, count + start))
        lengths.append((name, stat.st_size, rows))
        count += rows
    sha256 = sources.sha256_of(lengths)
    read = lambda i: _read(*shards[i])  # noqa: E731
    # Nobody knows how many rows a file has that cannot be opened.
    rest = Rest(count + len(problems))
    return Source(len(shards), read, count, sha256, times, rest, problems)


def open_huggingface(argument: str, settings: Settings) -> Source:
    """The rows of "PATH_OR_NAME" or "PATH_OR_NAME@SPLIT", with the same columns.

    A path is what `save_to_disk` wrote, or any other folder that `load_dataset` reads;
    only a name may be downloaded. An image may also have the `path` of its file.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "--source=hf: needs Hugging Face's datasets: pip install "
            "'imagen-jax[prepare]'"
        ) from None
    name, split = argument, ""
    if "@" in argument and not os.path.exists(argument):
        name, _, split = argument.rpartition("@")
    saved = ("state.json", "dataset_dict.json")
    is_saved = any(os.path.exists(os.path.join(name, file)) for file in saved)
    try:
        opened = (datasets.load_from_disk if is_saved else datasets.load_dataset)(name)
    # It raises errors of many kinds, and those of what it loads with.
    except Exception as error:
        brief = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hf:{name} cannot be opened: {brief}") from None
    split = split or "train"
    if isinstance(opened, datasets.Dataset):
        opened = {split: opened}
    if split not in opened:
        found = ", ".join(opened)
        raise UserError(f"hf:{name} has no split {split!r}, but {found}: add @SPLIT")
    rows = opened[split].with_format("arrow")
    columns = _columns(rows.features.arrow_schema, f"hf:{name}", settings)

    def read(shard: range) -> Iterator[Example | Problem]:
        for start in shard[::_ROWS]:
            table = rows[start : min(start + _ROWS, shard.stop)]
            for id, values in enumerate(zip(*map(table.column, columns)), start):
                place = f"{split}[{id}]"
                yield _example(settings, id, place, values, follow_paths=True)

    sha256 = sources.sha256_of([opened[split]._fingerprint, split, len(rows)])
    times = [os.stat(file["filename"]).st_mtime_ns for file in rows.cache_files]
    return sources.numbered(len(rows), settings, read, sha256, times=times)


def _columns(schema: Any, where: str, settings: Settings) -> list[str]:
    """The column of images and, unless there are no captions, that of captions."""
    wanted = [("pictures", "image_column", _IMAGES, _IS_IMAGE)]
    if not settings.no_captions:
        wanted.append(("captions", "caption_column", CAPTIONS, _IS_CAPTION))
    types = {name: str(type_) for name, type_ in zip(schema.names, schema.types)}
    columns = []
    for what, flag, usual, kind in wanted:
        asked = getattr(settings, flag)
        names = [asked] if asked else usual
        fits = [name for name in names if re.fullmatch(kind, types.get(name, ""))]
        if not fits:
            there = ", ".join(f"{name} ({type_})" for name, type_ in types.items())
            raise UserError(
                f"{where!r} has no column of {what} ({', '.join(names)}), but {there}: "
                f"name it with --{flag}"
            )
        columns.append(fits[0])
    return columns


def _read(
    settings: Settings, file: str, columns: list[str], start: int, stop: int, id: int
) -> Iterator[Example | Problem]:
    """Rows [start, stop) of a file; `id` is that of row `start`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = os.path.basename(file)
    row, reason = start, "the file ends before it"
    try:
        with pq.ParquetFile(file) as parquet:
            groups = range(parquet.num_row_groups)
            lengths = [parquet.metadata.row_group(group).num_rows for group in groups]
            ends = np.cumsum(lengths)
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            row = int(ends[first]) - lengths[first]
            for batch in parquet.iter_batches(_ROWS, groups[first : last + 1], columns):
                for values in zip(*map(batch.column, columns)):
                    if start <= row < stop:
                        own = id + row - start
                        yield _example(settings, own, f"{name}/{row}", values)
                    row += 1
                if row >= stop:
                    return
    except (pa.ArrowException, OSError) as error:
        reason = _brief(error)
    row = max(row, start)
    reason = f"{reason}; rows {row} to {stop - 1} are lost"
    yield Problem(f"{name}/{row}", reason, stop - row)


def _example(
    settings: Settings, id: int, name: str, values: tuple, follow_paths: bool = False
) -> Example | Problem:
    """The example of a row: an image, and a caption unless there are none."""
    data, *captions = map(_value, values)
    path = ""
    if follow_paths and not data:
        path = (values[0].as_py() or {}).get("path")
    if path and not os.path.isfile(path):
        return Problem(name, f"its picture {path!r} is no file")
    if not (data or path):
        return Problem(name, "has no picture")
    read = pathlib.Path(path).read_bytes if path else lambda: data
    caption = captions[0] if captions else None
    return sources.make_example(settings, id, name, caption, read)


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
