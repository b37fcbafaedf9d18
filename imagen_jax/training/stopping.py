"""Signals that ask a run to save and stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[int], bool]]:
    """Takes SIGINT and SIGTERM, and yields a function that is asked after each step.

    It says whether to save now and stop. Several processes get the same answer at the
    same step, whichever was sent the signal: JAX takes SIGTERM, and is handed Ctrl-C.
    A second signal (of several processes: a second Ctrl-C) ends the process at once,
    with status 128 + its number.
    """
    alone = jax.process_count() == 1
    received: list[int] = []

    def handle(number, frame):
        received.append(number)
        if not alone:
            signal.raise_signal(signal.SIGTERM)

    # Handlers wait for the main thread, which may compile for long; a thread does not.
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    threading.Thread(target=_leave_on_the_second, args=(reads,), daemon=True).start()
    taken = _SIGNALS if alone else _SIGNALS[:1]
    before = {number: signal.signal(number, handle) for number in taken}
    wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        if alone:
            yield lambda step: bool(received)
        else:
            yield multihost_utils.reached_preemption_sync_point
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writes)


def _leave_on_the_second(reads: int) -> None:
    """Reads the numbers of signals until the pipe is closed."""
    count = 0
    while byte := os.read(reads, 1):
        count += byte[0] in _SIGNALS
        if byte[0] in _SIGNALS and count == 1:
            sys.stderr.write("\nsaving ... (a second signal leaves at once, unsaved)\n")
        if count == 2:
            sys.stderr.write("\nerror: a second signal: left at once, unsaved\n")
            os._exit(128 + byte[0])
    os.close(reads)
