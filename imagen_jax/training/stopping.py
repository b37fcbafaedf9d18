"""What asks a run to save itself and leave: signals, and the machine's owner."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from imagen_jax.training import maintenance

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Tells after each step whether to stop.

    Of several processes, when one of them was asked to and all are at the same step.

    Attributes:
      why: what has come to this process, in words.
    """

    def __init__(self):
        self.why = "a signal"
        self._came: list[int] = []
        self._noticed = False
        self._alone = jax.process_count() == 1

    def __call__(self, step: int) -> bool:
        """Whether to save now, after `step`; all processes call it after each."""
        if self._alone:
            return bool(self._came) or self._noticed
        return multihost_utils.reached_preemption_sync_point(step)

    def notice(self, why: str) -> None:
        """Stops the run for another reason than a signal to this process."""
        self.why, self._noticed = why, True
        if not self._alone:
            # JAX's own handler takes it, and tells the others.
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number, frame) -> None:
        self._came.append(number)
        if len(self._came) > 1:
            _leave(number)
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """Takes SIGINT and SIGTERM, and asks the metadata server where there is one.

    The second signal ends the process at once, with status 128 + its number: what is
    being saved is then left, unfinished, beside the checkpoints. Of several processes
    JAX takes SIGTERM itself, and only Ctrl-C has a second time.
    """
    stop = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = _SIGNALS if stop._alone else _SIGNALS[:1]
    before = {number: signal.signal(number, stop._handle) for number in numbers}
    # Python's handlers wait for what the main thread is at, a compilation or a step
    # that hangs: a thread of its own does not.
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    old = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(reads,), daemon=True).start()
    try:
        with maintenance.watched(stop.notice):
            yield stop
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writes)


def _count(reads: int) -> None:
    count = 0
    while byte := os.read(reads, 1):
        count += byte[0] in _SIGNALS
        if count > 1:
            _leave(byte[0])
    os.close(reads)


def _leave(number: int) -> NoReturn:
    print(
        "\nerror: a second signal: left at once; the last checkpoint is as it was",
        file=sys.stderr,
        flush=True,
    )
    os._exit(128 + number)
