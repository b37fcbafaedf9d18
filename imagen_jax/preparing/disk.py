"""Files that appear whole or not at all, and what is said of a full disk."""

import contextlib
import errno
import os
import pathlib
import uuid
from collections.abc import Iterator

from imagen_jax.errors import UserError

_TEMPORARY = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives another name to write under; renames what was written to `path`.

    Several processes may do this to one path at once, with the same content.
    """
    # Under the same name a process would truncate what another is writing.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
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
    """Writes a file that appears whole or not at all."""
    with appearing(path) as partial:
        partial.write_text(text, "utf8")


def is_temporary(path: pathlib.Path) -> bool:
    """Whether a file is one that has not appeared, or never will."""
    return path.suffix == _TEMPORARY


def remove_temporary(folder: pathlib.Path) -> None:
    """Removes what killed processes left in `folder`."""
    for path in folder.iterdir():
        if is_temporary(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def full(folder: pathlib.Path):
    """Turns errors of a full disk into one that says what to do."""
    try:
        yield
    # TensorFlow has a class of its own for each error, and is not imported here.
    except Exception as error:  # noqa: BLE001
        is_full = getattr(error, "errno", None) in _FULL
        if is_full or type(error).__name__ == "ResourceExhaustedError":
            raise UserError(
                f"the disk of {str(folder)!r} is full: make room and start the same "
                "command again, it continues with the shard that it was at"
            ) from None
        raise
