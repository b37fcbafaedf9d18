"""Signals: the first one saves and stops, the second leaves at once."""

import os
import signal
import subprocess
import sys

import pytest

from imagen_jax.training.stopping import stopping

# Minutes in one call of C, during which no handler of Python's runs.
BUSY = """
import hashlib
from imagen_jax.training.stopping import stopping
with stopping():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_whatever_the_main_thread_does(number):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BUSY], **streams) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        # At once, though the main thread is busy.
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith("saving ... (a second signal")
        assert process.poll() is None
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert told.strip().startswith("error: a second signal: left at once")


def test_handlers_are_those_from_before_again():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stopping() as stops_after:
        assert not stops_after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops_after(2)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
