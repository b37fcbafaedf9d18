"""Files that strangers may have damaged or made up, and files that appear whole.

Whatever is in a file, the readers of JSON and .npz return what was asked for or raise
one `UserError`. They check before they allocate.
"""

import codecs
import contextlib
import csv
import json
import math
import os
import pathlib
import re
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from imagen_jax.errors import UserError, needing_room

# Of a JSON file; of its values a 32nd, which take up to 200 bytes of memory each.
_JSON_BYTES = 2**26
_JSON_LEVELS = 16
# To what a .npz file may unpack, or to so many times its size: of zeros numpy makes a
# 1,029th, of scenes that are drawn at 1,024 pixels a 269th.
_UNPACKED_BYTES = 2**28
_UNPACKED_RATIO = 500
_DIRECTORY_BYTES = 2**20
# How the names of files end that are not whole yet.
TEMPORARY = ".tmp"


def read_json(
    path: str | os.PathLike, what: str, most_bytes: int = _JSON_BYTES
) -> dict[str, Any]:
    """The object in a small JSON file, local or in a bucket.

    `UserError`, which calls the file `what` ("the config of a run"), when it is missing
    or `parse_json` refuses it.
    """
    data = _read(path, what, most_bytes + 1)
    return parse_json(data, f"{path} is not {what}", most_bytes)


def read_lines(path: str | os.PathLike, what: str) -> list[str]:
    """The `split_lines` of a text, local or in a bucket, without a byte order mark.

    `UserError`, which calls the file `what` ("captions"), when it is missing or a line
    is not UTF-8.
    """
    data = _read(path, what, -1).removeprefix(codecs.BOM_UTF8)
    lines = []
    for number, line in enumerate(split_lines(data), 1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} line {number} is not UTF-8 (byte {error.start + 1} is "
                f"0x{line[error.start]:02x}): save {what} as UTF-8"
            ) from None
    return lines


def read_rows(
    path: str | os.PathLike, what: str, kind: str
) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """The rows of a table, with the numbers of their last lines.

    Its `kind` is "csv" or "tsv", where the first line names the columns, or "jsonl",
    an object a line. Quotes of a "tsv" are text. `csv` has None for the name of what a
    row has too much, and for values that it lacks.

    `UserError`, which calls the file `what`, as by `read_lines` or where a row is none.
    """
    lines, number = read_lines(path, what), 0

    def taken():
        nonlocal number
        for line in lines:
            number += 1
            yield f"{line}\n"

    csv.field_size_limit(2**31 - 1)
    if kind == "jsonl":
        rows = (json.loads(line) for line in taken() if line.strip())
    elif kind == "tsv":
        rows = csv.DictReader(taken(), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.DictReader(taken(), strict=True)
    try:
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            yield number, row
    except (csv.Error, ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is no {kind}: {error}") from None


def split_lines(text: bytes) -> list[bytes]:
    """The lines of a text, which end at LF or CR LF and nowhere else."""
    lines = text.replace(b"\r\n", b"\n").split(b"\n")
    return lines if lines[-1] else lines[:-1]


def parse_json(
    data: bytes, otherwise: str, most_bytes: int = _JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in `data`; a `UserError`, `otherwise` and why, if there is none.

    Its numbers are integers or finite floats, and it is not nested deeply.
    """
    count, most = sum(map(data.count, (b",", b"[", b"{"))), most_bytes // 32
    try:
        if len(data) > most_bytes or count > most:
            raise ValueError(f"it has over {most_bytes:,} bytes or {most:,} values")
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        _check_value(values, _JSON_LEVELS)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{otherwise}: {error}") from None
    return values


def _check_value(value: Any, levels: int) -> None:
    """Raises `ValueError` for what is nested deeper, NaN, or too large for a float."""
    if isinstance(value, dict | list):
        if not levels:
            raise ValueError("it is nested too deeply")
        for own in value.values() if isinstance(value, dict) else value:
            _check_value(own, levels - 1)
    elif isinstance(value, int | float) and not abs(value) <= 1e308:
        raise ValueError("it holds a number that is none, or too large")


def is_file_name(value: Any) -> bool:
    """Whether `value` is the name of a file, in no other folder."""
    is_printable = isinstance(value, str) and value.isprintable()
    return is_printable and not re.search(r"^\.*$|[/\\]", value)


def read_index(path: os.PathLike, what: str) -> list[str]:
    """The files of an index of safetensors files; `UserError` as by `read_json`."""
    files = read_json(path, what).get("weight_map")
    if not (isinstance(files, dict) and all(map(is_file_name, files.values()))):
        raise UserError(f"{path} is not {what}: its weight_map names no files")
    return sorted(set(files.values()))


def open_tensors(path: os.PathLike) -> Any:
    """An open safetensors file, to be closed by `with`; `UserError` without one."""
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{str(path)!r} is missing or damaged, or no safetensors file ({reason}): "
            "copy it again"
        ) from None


def find_tensors(
    paths: Iterable[os.PathLike],
) -> tuple[dict[str, tuple[int, ...]], dict[str, os.PathLike]]:
    """The shape and the file of every tensor in safetensors files, by name."""
    shapes, files = {}, {}
    for path in paths:
        with open_tensors(path) as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
                files[name] = path
    return shapes, files


def read_arrays(
    path: str | os.PathLike, what: str, expected: Mapping[str, tuple[str, tuple]]
) -> dict[str, np.ndarray]:
    """Arrays of a .npz file whose types and shapes are known.

    `expected` has each one's type, as "|u1", and shape. Type "<U" is text of any width.
    `UserError` when the file, called `what`, is missing, damaged or another one, or
    there is no room for its arrays.
    """
    with _unzipped(path, what) as archive:
        total = sum(_check(archive, name, *own) for name, own in expected.items())
        archive.fp.seek(0, os.SEEK_END)
        most = max(_UNPACKED_BYTES, _UNPACKED_RATIO * archive.fp.tell())
        most = min(most, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if total > most:
            raise ValueError(f"it unpacks to {total:,} bytes, more than {most:,}")
        arrays = {}
        for name in expected:
            with archive.open(f"{name}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            if array.dtype == bool and array.view(np.uint8).max(initial=0) > 1:
                raise ValueError(f"{name} is not of truth values")
            arrays[name] = array
        return arrays


def _check(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple) -> int:
    """The bytes of an array; `ValueError` unless it is of `dtype` and `shape`."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        is_known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not is_known or version != (1, 0):
            raise ValueError(f"{name} is not as numpy writes arrays")
        own_shape, _, own = np.lib.format.read_array_header_1_0(member)
        start = member.tell()
    is_text = dtype == "<U" == own.str[:2]
    if own_shape != shape or not (is_text or own.str == dtype):
        raise ValueError(f"{name} is {own.str} {own_shape}, not {dtype} {shape}")
    size = math.prod(shape) * own.itemsize
    if info.file_size != start + size:
        raise ValueError(f"{name} has {info.file_size:,} bytes, too few or too many")
    return size


class _Reader:
    """A file of which zipfile reads no large directory: each entry takes 600 bytes."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_BYTES:
            raise ValueError("it holds too many files")
        return self._file.read(size)


@contextlib.contextmanager
def _unzipped(path: str | os.PathLike, what: str) -> Iterator[zipfile.ZipFile]:
    try:
        with _open(path) as file, zipfile.ZipFile(_Reader(file)) as archive:
            if len(names := archive.namelist()) > len(set(names)):
                raise ValueError("it holds two files of one name")
            yield archive
    except Exception as error:  # zipfile raises errors of many kinds.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{os.fspath(path)!r} is not {what}, or is damaged ({reason}): copy it or "
            "make it again"
        ) from None


def _read(path: str | os.PathLike, what: str, most_bytes: int) -> bytes:
    try:
        with _open(path) as file:
            return file.read(most_bytes)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it should hold {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not {what}: {error}") from None


def _open(path: str | os.PathLike) -> IO[bytes]:
    # A pipe or a device might be read for ever.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is no file")
    return epath.Path(path).open("rb")


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives another name to write under; renames what was written to `path`.

    Its mode is the umask's, whatever a library has written there: some write a file of
    their own, for its owner alone, and rename it.
    """
    # Of its own, as several processes may write the same at once.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with needing_room(path.parent):
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            if partial.stat().st_mode != mode:
                partial.chmod(mode)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except FileNotFoundError:
        # Another process was first, and removed what it took for left over.
        if not path.exists():
            raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file of JSON that appears whole or not at all."""
    with appearing(path) as partial:
        # As JSON escapes them: bytes of a name that are not UTF-8.
        partial.write_text(text, "utf8", "backslashreplace")
