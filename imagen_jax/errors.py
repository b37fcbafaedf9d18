"""Errors that users are meant to read, and what goes into their messages."""

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator

# What Orbax warns of where checkpoints are only read, which is as it should be.
READ_ONLY = "Given directory is read only"
# No room, no quota, no larger file allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Bad input: says what is wrong, where, and what to do.

    Doors print it as one line and exit with status 1; no traceback.
    """

    def __init__(self, message: str):
        # It may quote what a stranger wrote.
        super().__init__(message if len(message) < 5000 else f"{message[:5000]}...")


class Stopped(Exception):
    """The run was asked to stop, and has saved its state; doors exit with status 3."""


def printable(text: object) -> str:
    """`text` on one line for a terminal, which the names of files could control.

    What `repr` would escape in it is escaped.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the nearest allowed word, or ""."""
    near = difflib.get_close_matches(word[:99], list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
