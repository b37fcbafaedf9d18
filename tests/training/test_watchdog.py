"""A step that hangs is shown, one that does not is not."""

import threading
import time

import pytest

from imagen_jax.training.watchdog import Watchdog
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock()


def _steps(dog, clock, *seconds):
    for each in seconds:
        clock.advance(each)
        dog.step()


def a_thread_that_waits(release):
    release.wait()


def _hang(tmp_path, clock, seconds):
    """What is written when, after steps of a second, so long nothing happens."""
    with open(tmp_path / "log", "w") as log:
        dog = Watchdog(least_seconds=0.5, file=log, clock=clock.monotonic)
        # Ten times is half a second; it is waited for on a real clock.
        _steps(dog, clock, 0, *[0.05] * 8)
        time.sleep(seconds)
        dog.close()
    return (tmp_path / "log").read_text()


def test_a_hanging_step_shows_every_thread(tmp_path, clock):
    release = threading.Event()
    other = threading.Thread(target=a_thread_that_waits, args=(release,))
    other.start()
    shown = _hang(tmp_path, clock, 1.0)
    release.set()
    assert "a_thread_that_waits" in shown
    assert "test_a_hanging_step_shows_every_thread" in shown


def test_a_step_takes_ten_times_the_median(clock):
    dog = Watchdog(least_seconds=0, clock=clock.monotonic)
    _steps(dog, clock, 100, 1, 2, 3, 2)
    assert dog.allowed() is None, "four steps are too few"
    _steps(dog, clock, 2)
    assert dog.allowed() == 20
    # The mean of these is over a hundred.
    _steps(dog, clock, 100_000)
    assert dog.allowed() == 20
    # What was usual long ago is not for ever.
    _steps(dog, clock, *[8] * 200)
    assert dog.allowed() == 80
    dog.close()


def test_less_than_a_minute_is_never_shown(clock):
    dog = Watchdog(clock=clock.monotonic)
    _steps(dog, clock, *[1] * 10)
    assert dog.allowed() == 60
    _steps(dog, clock, *[16] * 40)
    assert dog.allowed() == 160
    dog.close()


def test_what_is_no_step_is_measured_by_its_like(clock):
    dog = Watchdog(least_seconds=0, clock=clock.monotonic)
    _steps(dog, clock, *[1] * 10)
    assert dog.allowed("evaluation", fewest=1) is None
    for _ in range(9):
        with dog.apart("evaluation"):
            # What the devices had still to do.
            _steps(dog, clock, 32)
        # Of this the beginning is not known.
        _steps(dog, clock, 32)
    assert dog.allowed() == 10
    assert dog.allowed("evaluation", fewest=1) == 320
    dog.close()


def test_what_ends_is_not_shown(tmp_path, clock):
    """Nor what comes after an evaluation is watched as if it went on."""
    with open(tmp_path / "log", "w") as log:
        dog = Watchdog(least_seconds=0.3, file=log, clock=clock.monotonic)
        _steps(dog, clock, *[0.01] * 10)
        with dog.apart("evaluation"):
            time.sleep(0.6)
        dog.step()
        dog.close()
        time.sleep(0.6)
    assert (tmp_path / "log").read_text() == ""


def test_a_hang_after_an_evaluation_is_shown(tmp_path, clock):
    with open(tmp_path / "log", "w") as log:
        dog = Watchdog(least_seconds=0.3, file=log, clock=clock.monotonic)
        _steps(dog, clock, *[0.01] * 10)
        with dog.apart("evaluation"):
            pass
        time.sleep(0.6)
        dog.close()
    assert "test_a_hang_after_an_evaluation_is_shown" in (tmp_path / "log").read_text()
