"""A run whose disk fails ends with one error, and goes on when that is over."""

import contextlib
import errno
import os
import resource
import shutil
import threading
import time

import jax
import pytest

from imagen_jax.errors import UserError
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.metrics import MetricWriter
from tests import tiny
from tests.training.checkpoints import CFG, assert_equal, mesh

# Orbax's; when one of them has failed the others still finish their work.
WRITERS = {"array_type_handler", "serialize_shardings", "write_metadata_after_commits"}


@pytest.fixture(autouse=True)
def _quick(no_arithmetic):
    pass


def train(workdir, hook=None):
    batches = tiny.Batches(CFG, mesh())
    batches.hook = hook or batches.hook
    return jax.device_get(loop.train(CFG, str(workdir), batches, mesh()))


def assert_goes_on(workdir):
    """Bitwise as if nothing had been, in a process of its own."""
    while WRITERS & {thread.name for thread in threading.enumerate()}:
        time.sleep(0.01)
    found = train(workdir)
    assert_equal(found, train(workdir.with_name("whole")))
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit(tmp_path):
    """Files of at most 9 kB stand for a full disk; the next save or the end tells."""
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(taken):
        if taken == 3:
            while not (run / "checkpoints/2").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))

    try:
        with pytest.raises(UserError) as found:
            train(run, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in str(found.value)
    assert Checkpointer(str(run)).newest() == 2
    assert_goes_on(run)


@pytest.mark.slow
def test_no_room_for_a_line_of_the_logs(tmp_path, monkeypatch):
    run, calls, write = tmp_path / "run", [], MetricWriter.event

    def full(self, *args, **more):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.jsonl")
        write(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "event", full)
        with pytest.raises(UserError, match="cannot be written .*No space left"):
            train(run)
    assert_goes_on(run)


@pytest.mark.parametrize("where", ["file/run", "/proc/run"])
def test_a_workdir_that_cannot_be_made(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written "):
        train(tmp_path / where)


@pytest.mark.slow
def test_a_workdir_that_is_taken_away_while_it_trains(tmp_path):
    run = tmp_path / "run"

    def take(taken):
        if taken == 3:
            (tmp_path / "file").write_text("")
            shutil.move(run, tmp_path / "elsewhere")
            while not run.is_file():
                # A write that is under way may make the folder again.
                shutil.rmtree(run, ignore_errors=True)
                with contextlib.suppress(IsADirectoryError):
                    os.rename(tmp_path / "file", run)

    with pytest.raises(UserError, match="cannot be written .*(Not a dir|NOT_FOUND)"):
        train(run, take)
    run.unlink()
    shutil.move(tmp_path / "elsewhere", run)
    assert_goes_on(run)
