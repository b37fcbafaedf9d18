"""Errors that users are meant to read, and files that are read or written whole."""

import contextlib
import difflib
import errno
import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

# How the names of files end that are not whole yet.
TEMPORARY = ".tmp"
# No room, no quota, no larger file allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Bad input: says what is wrong, where, and what to do.

    Doors print it as one line and exit with status 1; no traceback.
    """


class Stopped(Exception):
    """The run was asked to stop, and has saved its state; doors exit with status 3."""


def printable(text: object) -> str:
    """`text` on one line for a terminal, which the names of files could control.

    What `repr` would escape in it is escaped.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the nearest allowed word, or ""."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """The object in a small JSON file, local or in a bucket.

    `UserError`, which calls the file `what` ("the config of a run"), when it is missing
    or does not hold a JSON object.
    """
    try:
        values = json.loads(epath.Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it should hold {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not {what}: it holds no JSON object")
    return values


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full; TensorFlow and TensorStore say it."""
    number, text = getattr(error, "errno", None), str(error)
    return any(number == full or os.strerror(full) in text for full in _FULL)


@contextlib.contextmanager
def needing_room(folder: str | os.PathLike) -> Iterator[None]:
    """Raises a `UserError` for a full disk."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"the disk of {str(folder)!r} is full: make room and start again"
        ) from None


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives another name to write under; renames what was written to `path`."""
    # Of its own, as several processes may write the same at once.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with needing_room(path.parent):
            yield partial
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
