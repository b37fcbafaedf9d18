"""Parquet files with the bytes of pictures and their captions."""

import os
from collections.abc import Iterator

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources as originals
from imagen_jax.preparing.folder import decode_caption

# Hugging Face's `datasets` and img2dataset, then what others use.
_PICTURES = ("image", "jpg", "png", "webp", "image_bytes", "img")
_CAPTIONS = ("caption", "text", "TEXT", "captions", "txt", "prompt")
# Rows in memory at a time.
_ROWS = 64


def open_parquet(pattern: str, size: int) -> originals.Originals:
    """The rows of the files that match `pattern`; `size` of one file make a shard.

    A picture is a binary column or a struct with `bytes`, a caption a string or a list
    of strings, of which one is taken (`originals.choose`). Files that are no Parquet
    are problems.

    Raises:
      UserError: when no file matches or can be read, or a file has no such columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = originals.files_of(pattern, "Parquet file")
    problems, parts, count, rows_of = [], [], 0, []
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            name = os.path.basename(file)
            problems.append(originals.Problem(name, _brief(error)))
            continue
        columns = _columns(schema, file)
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            parts.append((file, columns, start, stop, count + start))
        rows_of.append((os.path.basename(file), os.path.getsize(file), rows))
        count += rows
    if not parts:
        reason = f": {problems[0].name}: {problems[0].reason}" if problems else ""
        raise UserError(f"no file that matches {pattern!r} has rows{reason}")
    return originals.Originals(
        len(parts),
        lambda shard: _read(*parts[shard]),
        count,
        problems,
        originals.sha256_of(rows_of),
    )


def _columns(schema, file: str) -> tuple[str, str]:
    import pyarrow as pa

    def is_picture(kind):
        if pa.types.is_struct(kind):
            return any(f.name == "bytes" and is_picture(f.type) for f in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_text(kind):
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return is_text(kind.value_type)
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    types = dict(zip(schema.names, schema.types))
    picture = [n for n in _PICTURES if n in types and is_picture(types[n])]
    caption = [n for n in _CAPTIONS if n in types and is_text(types[n])]
    for found, what, names in (
        (picture, "the bytes of pictures", _PICTURES),
        (caption, "captions", _CAPTIONS),
    ):
        if not found:
            raise UserError(
                f"{file!r} has no column with {what} ({', '.join(names)}); it has "
                f"{', '.join(f'{n} ({t})' for n, t in types.items())}"
            )
    return picture[0], caption[0]


def _read(
    file, columns, start, stop, first_id
) -> Iterator[originals.Example | originals.Problem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = start
    try:
        with pq.ParquetFile(file) as parquet:
            groups, row = _groups(parquet, start, stop)
            for batch in parquet.iter_batches(_ROWS, groups, list(columns)):
                pictures, captions = batch.column(0), batch.column(1)
                if batch.schema.names[0] != columns[0]:
                    pictures, captions = captions, pictures
                for i in range(len(batch)):
                    if start <= row < stop:
                        yield _example(
                            f"{os.path.basename(file)}/{row}",
                            pictures[i],
                            captions[i],
                            first_id + row - start,
                        )
                    row += 1
                if row >= stop:
                    return
    except (pa.ArrowException, OSError) as error:
        row = max(row, start)
        name = f"{os.path.basename(file)}/{row}"
        reason = f"{_brief(error)}; rows {row} to {stop - 1} are lost"
        yield originals.Problem(name, reason)


def _groups(parquet, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows [start, stop), and the first row of the first."""
    groups, first, begin = [], start, 0
    for group in range(parquet.metadata.num_row_groups):
        end = begin + parquet.metadata.row_group(group).num_rows
        if begin < stop and end > start:
            first = first if groups else begin
            groups.append(group)
        begin = end
    return groups, first


def _example(name, picture, caption, id) -> originals.Example | originals.Problem:
    import pyarrow as pa

    if pa.types.is_struct(picture.type):
        picture = picture["bytes"] if picture.is_valid else picture
    data = picture.as_py()
    if not data:
        return originals.Problem(name, "has no picture")
    if isinstance(caption, pa.ListScalar):
        caption = originals.choose(list(caption.values or []), id)
    # As bytes: Arrow does not check that a string is UTF-8.
    text = caption.as_buffer() if caption and caption.is_valid else None
    text = decode_caption(text.to_pybytes()) if text else ""
    if text is None:
        return originals.Problem(name, originals.NOT_UTF8)
    if not text:
        return originals.Problem(name, originals.EMPTY_CAPTION)
    return originals.Example(id, name, text, lambda: data)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
