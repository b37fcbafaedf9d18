"""Shows where a training hangs."""

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import TextIO

_FACTOR = 10.0
# Steps may be short, and other work on the host may hold one up.
_LEAST_SECONDS = 60.0
# Of so many the median is taken, and of no fewer than so many.
_KEPT, _FEWEST = 101, 5


class Watchdog:
    """Prints the stack of every thread when a step takes 10 times the median.

    A step is the time between two that the devices finish: waiting for a batch and
    saving are part of it. What is shorter than a minute is never shown. A thread
    without Python's lock prints: it does so even if all of Python waits. The training
    is left to itself; who watches it can tell where it was.
    """

    def __init__(
        self,
        least_seconds: float = _LEAST_SECONDS,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Watches nothing yet.

        Args:
          least_seconds: what is shorter is never shown.
          file: with a descriptor, for the stacks; stderr by default.
          clock: in seconds, by which steps are measured.
        """
        self._least = least_seconds
        self._file = file or sys.__stderr__
        self._clock = clock
        self._lock = threading.RLock()
        self._last: float | None = None
        self._apart = False
        self._known: defaultdict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=_KEPT)
        )

    def step(self) -> None:
        """A step is finished, and the next one begins; called from any thread."""
        with self._lock:
            if self._apart:
                return
            now = self._clock()
            if self._last is not None:
                self._known["step"].append(now - self._last)
            self._last = now
            self._watch(self.allowed())

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """What is inside is no step; it is measured by the same `what` before."""
        with self._lock:
            self._apart = True
            begun = self._clock()
            self._watch(self.allowed(what, fewest=1))
        try:
            yield
        finally:
            with self._lock:
                self._apart, self._last = False, None
                self._known[what].append(self._clock() - begun)
                self._watch(self.allowed())

    def allowed(self, what: str = "step", fewest: int = _FEWEST) -> float | None:
        """Seconds that it may take; None while not even the `fewest` are known."""
        known = self._known[what]
        if len(known) < fewest:
            return None
        return max(self._least, _FACTOR * statistics.median(known))

    def close(self) -> None:
        """Nothing is watched any more."""
        with self._lock:
            self._apart = True
            self._watch(None)

    def _watch(self, seconds: float | None) -> None:
        if seconds is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(seconds, file=self._file)
