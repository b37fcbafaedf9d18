"""Where the time of a run goes, by a clock and a device that are scripted."""

import threading

from imagen_jax.training.stopwatch import Stopwatch
from tests.clock import Clock


class Result:
    """Of a step on a device that finishes when it is told to."""

    def __init__(self):
        self.finished = threading.Event()

    def is_ready(self):
        return self.finished.is_set()

    def block_until_ready(self):
        assert self.finished.wait(30)
        return self


class Device:
    """A stopwatch's steps, finished one by one."""

    def __init__(self, clock):
        self.clock, self.told = clock, threading.Semaphore(0)
        self.stopwatch = Stopwatch(clock.monotonic, clock.wall)
        self.stopwatch.train_from(0, self.told.release)

    def finish(self, result, seconds):
        """After so many seconds more."""
        self.clock.advance(seconds)
        result.finished.set()
        assert self.told.acquire(timeout=30)


def test_what_the_host_waits_for_while_a_step_is_on_its_way_is_the_steps():
    clock = Clock()
    device = Device(clock)
    stopwatch, first, second = device.stopwatch, Result(), Result()
    with stopwatch.bucket("input_wait"):
        clock.advance(4)
    stopwatch.handed(1, first)
    stopwatch.handed(2, second)
    with stopwatch.bucket("input_wait"):
        device.finish(first, 2)
        assert stopwatch.done == 1
        device.finish(second, 1)
        assert stopwatch.done == 2
        # Now the device stands still.
        clock.advance(8)
    clock.advance(16)
    lap = stopwatch.lap()
    assert lap["spent"] == {"input_wait": 12.0, "step": 19.0}
    assert lap["monotonic"] == clock.monotonic() and lap["seconds"] == clock.wall()
    assert stopwatch.lap()["spent"] == {}
    stopwatch.close()


def test_a_lap_needs_no_step_to_be_finished():
    clock = Clock()
    device = Device(clock)
    result = Result()
    device.stopwatch.handed(1, result)
    with device.stopwatch.bucket("checkpoint"):
        clock.advance(2)
        assert device.stopwatch.lap()["spent"] == {"step": 2.0}
        device.finish(result, 1)
        clock.advance(4)
    assert device.stopwatch.lap()["spent"] == {"step": 1.0, "checkpoint": 4.0}
    device.stopwatch.close()


def test_a_step_that_fails_is_over():
    class Fails(Result):
        def block_until_ready(self):
            super().block_until_ready()
            raise RuntimeError("out of memory")

    clock = Clock()
    device = Device(clock)
    failing, next_one = Fails(), Result()
    device.stopwatch.handed(1, failing)
    device.finish(failing, 1)
    device.stopwatch.handed(2, next_one)
    device.finish(next_one, 1)
    with device.stopwatch.bucket("evaluation"):
        clock.advance(4)
    assert device.stopwatch.lap()["spent"] == {"step": 2.0, "evaluation": 4.0}
    device.stopwatch.close()


def test_buckets_are_where_they_were_after_an_error():
    clock = Clock()
    stopwatch = Stopwatch(clock.monotonic, clock.wall)
    clock.advance(1)
    try:
        with stopwatch.bucket("compile"):
            clock.advance(2)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        clock.advance(4)
    assert stopwatch.lap()["spent"] == {"start": 5.0, "compile": 2.0}
