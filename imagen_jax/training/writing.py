"""What is said when a workdir cannot be written or read."""

import contextlib
import errno
import os
import re
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

    Args:
      workdir: that is written and read inside.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        number = _number(error)
        if number is None:
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
