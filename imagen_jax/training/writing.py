"""What is said when a workdir cannot be written or read."""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator

from imagen_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# TensorStore's errors are ValueErrors: "RESOURCE_EXHAUSTED: Error writing local file
# ... No space left on device [os_error_code='28']".
_STATUS = re.compile(r"[A-Z]{3,}(_[A-Z]+)*: ")
_NUMBER = re.compile(r"\[os_error_code='(\d+)'\]")
_SHOWN = 300


@contextlib.contextmanager
def writing(workdir: str) -> Iterator[None]:
    """Turns errors of a file system into one `UserError`, and lets others pass.

    Each of Orbax's threads and tasks that fails shows a traceback of its own, some when
    Python ends; the first of their errors is raised too, and so the others are hidden.

    Args:
      workdir: that is written and read inside.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_raised_by_nobody)
    shows = sys.unraisablehook
    sys.unraisablehook = lambda found: _is_echo(found.exc_value) or shows(found)
    try:
        yield
        sys.unraisablehook = shows
    except (OSError, ValueError) as error:
        number = _number(error)
        if number is None:
            sys.unraisablehook = shows
            raise
        hint = "start the same command again when it can be"
        if number in _FULL:
            hint = "make room, and start the same command again"
        reason = " ".join(str(error).split())
        if len(reason) > _SHOWN:
            reason = f"{reason[:_SHOWN]} ... {os.strerror(number) if number else ''}"
        raise UserError(
            f"the workdir {workdir} cannot be written: {reason}\nIts whole checkpoints "
            f"stay as they are. To go on from the newest, {hint}"
        ) from None


def _number(error: Exception) -> int | None:
    """The number of an error of the system, 0 when it has none; None for another."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error) is not ValueError or not _STATUS.match(str(error)):
        return None
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else 0


def _is_raised_by_nobody(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _is_echo(record.exc_info[1]))


def _is_echo(error: BaseException | None) -> bool:
    """Whether it comes of a write that failed."""
    # What TensorStore tells a task that has given up already.
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    return closed or (isinstance(error, Exception) and _number(error) is not None)
