"""One run at a time in a workdir."""

import fcntl
import os
import pathlib
import socket
import uuid

import jax
from etils import epath
from jax.experimental import multihost_utils

from imagen_jax.errors import UserError

FILE_NAME = "lock"


class Claim:
    """Holds a workdir, until `close` or the end of the process.

    On a disk by a lock on a file, which dies with its process. A bucket has no locks:
    there the run that started last has the workdir, and `check` stops the older one.
    All processes make it, check it and get the same error together.
    """

    def __init__(self, workdir: str):
        """Raises `UserError` when another process holds `workdir`."""
        self.workdir = workdir
        own = f"process {os.getpid()} on {socket.gethostname()}"
        self._token = f"{own}, {uuid.uuid4()}"
        self._file, other = None, ""
        if jax.process_index() == 0:
            folder = epath.Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            if "://" in workdir:
                (folder / FILE_NAME).write_text(self._token)
            else:
                other = self._lock(pathlib.Path(workdir) / FILE_NAME)
        if _any_process(other):
            raise UserError(
                f"another run is at work in {workdir}{other and f' ({other})'}: wait "
                "for its end or stop it, or give another --workdir"
            )

    def _lock(self, path: pathlib.Path) -> str:
        """Takes the lock; else returns who has it."""
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            return self._file.read().partition(",")[0] or "unknown"
        self._file.truncate(0)
        self._file.write(self._token)
        self._file.flush()
        return ""

    def taken_by(self) -> str:
        """The newer run that has taken a workdir in a bucket; for process 0 only."""
        if "://" not in self.workdir:
            return ""
        found = (epath.Path(self.workdir) / FILE_NAME).read_text()
        return "" if found == self._token else found.partition(",")[0]

    def check(self) -> None:
        """Raises `UserError` when a newer run has taken the workdir."""
        other = self.taken_by() if jax.process_index() == 0 else ""
        if "://" in self.workdir and _any_process(other):
            raise UserError(
                f"a newer run has taken {self.workdir}{other and f' ({other})'}: this "
                "one stops without saving"
            )

    def close(self) -> None:
        """Lets others have the workdir."""
        if self._file:
            self._file.close()


def _any_process(other: str) -> bool:
    """Whether process 0 has found another run; the same in all processes."""
    return bool(multihost_utils.broadcast_one_to_all(bool(other)))
