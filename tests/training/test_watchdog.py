"""A step that hangs is shown, one that does not is not."""

import threading
import time

from imagen_jax.training.watchdog import Watchdog


def _steps(dog, count, seconds):
    for _ in range(count):
        dog.step()
        time.sleep(seconds)


def a_thread_that_waits(release):
    release.wait()


def test_a_hanging_step_shows_every_thread(tmp_path):
    release = threading.Event()
    other = threading.Thread(target=a_thread_that_waits, args=(release,))
    other.start()
    with open(tmp_path / "log", "w") as log:
        dog = Watchdog(ahead=5, least_seconds=0.5, file=log)
        _steps(dog, 12, 0.001)
        time.sleep(1.0)
        dog.rest()
    release.set()
    shown = (tmp_path / "log").read_text()
    assert "a_thread_that_waits" in shown
    assert "test_a_hanging_step_shows_every_thread" in shown


def test_waiting_for_what_the_device_has_to_do_is_not_shown(tmp_path):
    """Nor are rests, nor the first steps, of which nothing is known."""
    with open(tmp_path / "log", "w") as log:
        dog = Watchdog(ahead=5, least_seconds=0, file=log)
        _steps(dog, 3, 0.3)
        for _ in range(4):
            _steps(dog, 4, 0)
            _steps(dog, 1, 0.3)
        dog.rest()
        time.sleep(1.5)
        dog.step()
        dog.rest()
    assert (tmp_path / "log").read_text() == ""
