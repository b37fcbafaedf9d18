"""Shows where a training hangs."""

import faulthandler
import sys
import time
from collections import deque
from typing import TextIO

# Steps may be short, and other work on the host may hold one up.
_LEAST_SECONDS = 60.0
_STEPS = 10


class Watchdog:
    """Prints the stack of every thread when a step takes far longer than usual.

    That is ten steps longer than it may wait for steps before it, and at least a
    minute. A thread without Python's lock prints: it does so even if all of Python
    waits. The training is left to itself; who watches it can tell where it was.
    """

    def __init__(
        self,
        ahead: int,
        least_seconds: float = _LEAST_SECONDS,
        file: TextIO | None = None,
    ):
        """Watches a loop that hands the device up to `ahead` steps in advance.

        Args:
          ahead: so many steps one of the host's may have to wait for.
          least_seconds: what is shorter is never shown.
          file: with a descriptor, for the stacks; stderr by default.
        """
        self._ahead = ahead
        self._least = least_seconds
        self._file = file or sys.__stderr__
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=2 * ahead)

    def step(self) -> None:
        """A step is done, and the next one begins."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now
        if len(self._seconds) == self._seconds.maxlen:
            mean = sum(self._seconds) / len(self._seconds)
            allowed = max(self._least, (self._ahead + _STEPS) * mean)
            faulthandler.dump_traceback_later(allowed, file=self._file)

    def rest(self) -> None:
        """What comes before the next `step` is no step, and is not watched."""
        self.close()
        self._last = None

    def close(self) -> None:
        """Nothing is watched any more."""
        faulthandler.cancel_dump_traceback_later()
