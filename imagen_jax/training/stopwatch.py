"""Where the time of a run goes: every moment is in one bucket.

The host hands the devices steps in advance, so what it waits for need not keep them
waiting. While a step is on its way all time is the step's, whatever the host does; else
it is that of what the host does (docs/goodput.md).
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax


class Stopwatch:
    """Shares out the seconds of a run from when it is made; "start" has the first.

    Attributes:
      done: the last step that the devices have finished.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        """Takes two clocks, in seconds.

        Args:
          monotonic: durations are its differences.
          wall: seconds since 1970; may jump.
        """
        self.done = 0
        self._monotonic, self._wall = monotonic, wall
        self._lock = threading.Lock()
        self._bucket = "start"
        self._since = self._monotonic()
        self._spent: dict[str, float] = {}
        self._on_their_way = 0
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._on_finished: Callable[[], None] = lambda: None

    def train_from(self, step: int, on_finished: Callable[[], None]) -> None:
        """From now on what is in no other bucket is "step".

        Args:
          step: that the state is at.
          on_finished: called after each step that the devices finish, in any thread.
        """
        self._charge()
        self.done, self._bucket, self._on_finished = step, "step", on_finished

    @contextlib.contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """What the host does inside, while no step is on its way, is in `name`."""
        self._charge()
        before, self._bucket = self._bucket, name
        try:
            yield
        finally:
            self._charge()
            self._bucket = before

    def handed(self, step: int, result: jax.Array) -> None:
        """Step number `step` is on its way until its `result` is ready.

        It is waited for in a thread: the loop does not wait.
        """
        if result.is_ready():
            self._finish(step, 0)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, daemon=True)
            self._thread.start()
        self._charge(1)
        self._queue.put((step, result))

    def lap(self) -> dict[str, Any]:
        """For a line of the event log: both clocks, and "spent", seconds by bucket.

        These are since the lap before; their sum is what the monotonic clock went on.
        """
        with self._lock:
            self._charge_locked()
            spent, self._spent = self._spent, {}
            return {"seconds": self._wall(), "monotonic": self._since, "spent": spent}

    def close(self) -> None:
        """No more steps come."""
        self._queue.put(None)

    def _wait(self) -> None:
        while (item := self._queue.get()) is not None:
            step, result = item
            # The loop meets the error itself.
            with contextlib.suppress(Exception):
                jax.block_until_ready(result)
            self._finish(step, -1)

    def _finish(self, step: int, change: int) -> None:
        self._charge(change)
        self.done = step
        self._on_finished()

    def _charge(self, change: int = 0) -> None:
        """Shares out the time up to now; then so many more steps are on their way."""
        with self._lock:
            self._charge_locked()
            self._on_their_way += change

    def _charge_locked(self) -> None:
        now = self._monotonic()
        bucket = "step" if self._on_their_way else self._bucket
        if now > self._since:
            self._spent[bucket] = self._spent.get(bucket, 0.0) + now - self._since
        self._since = now
