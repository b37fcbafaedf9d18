"""What a run says when its disk fails, and that it goes on when that is over."""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.metrics import MetricWriter
from imagen_jax.training.writing import writing
from tests import tiny

# Orbax's; what they were at when another of them failed they still finish.
WRITERS = {"array_type_handler", "serialize_shardings", "write_metadata_after_commits"}

CFG = tiny.with_steps(tiny.stage(model=tiny.ONE_LEVEL), 8)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(autouse=True)
def _quick(no_arithmetic):
    pass


def train(workdir, mesh, hook=None):
    batches = tiny.Batches(CFG, mesh)
    batches.hook = hook or batches.hook
    return jax.device_get(loop.train(CFG, str(workdir), batches, mesh))


def assert_goes_on(workdir, mesh):
    """Bitwise as if nothing had been, in a process of its own."""
    while WRITERS & {thread.name for thread in threading.enumerate()}:
        time.sleep(0.01)
    found = train(workdir, mesh)
    want = train(workdir.with_name("whole"), mesh)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
    unfinished = (workdir / "checkpoints").glob("*tmp*")
    assert not list(unfinished)


@contextlib.contextmanager
def files_of_at_most(count):
    """Bytes in this process's files: writing more fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("step", [3, 7])
def test_a_checkpoint_that_does_not_fit(tmp_path, mesh, step):
    """Told by the next save, or at the end; the one before is whole."""
    run = tmp_path / "run"
    with files_of_at_most(9_000) as limit:

        def fill(taken):
            if taken == step:
                while not (run / "checkpoints" / str(step - 1)).exists():
                    time.sleep(0.01)
                limit()

        with pytest.raises(UserError) as found:
            train(run, mesh, fill)
    message = str(found.value)
    assert message.startswith(f"the workdir {run} cannot be written: ")
    assert os.strerror(errno.EFBIG) in message
    assert "start the same command again" in message
    assert Checkpointer(str(run)).newest() == step - 1
    assert_goes_on(run, mesh)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")


@pytest.mark.parametrize("failing", ["scalars", "event"])
def test_no_room_for_a_line_of_the_logs(tmp_path, mesh, monkeypatch, failing):
    run, calls = tmp_path / "run", []
    write = getattr(MetricWriter, failing)

    def full(self, *args, **more):
        calls.append(args)
        if len(calls) == 3:
            raise FULL
        write(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, failing, full)
        with pytest.raises(UserError, match="No space left.*\n.*make room, and start"):
            train(run, mesh)
    assert_goes_on(run, mesh)


@pytest.mark.parametrize("where", ["file/run", "/proc/run", "/sys/run"])
def test_a_workdir_that_cannot_be_made(tmp_path, mesh, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: "):
        train(tmp_path / where, mesh)


def test_a_workdir_that_is_taken_away_while_it_trains(tmp_path, mesh):
    run = tmp_path / "run"

    def take(taken):
        if taken == 3:
            shutil.move(run, tmp_path / "elsewhere")
            run.write_text("")

    with pytest.raises(UserError, match="cannot be written: .*Not a directory"):
        train(run, mesh, take)
    run.unlink()
    shutil.move(tmp_path / "elsewhere", run)
    assert_goes_on(run, mesh)


def test_a_checkpoint_that_is_half_deleted(tmp_path, mesh, capsys):
    """The newest of them; the run goes on from the one before."""
    run = tmp_path / "run"

    def interrupt(taken):
        if taken == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, mesh, interrupt)
    newest = Checkpointer(str(run)).newest()
    for path in sorted((run / "checkpoints" / str(newest)).rglob("*"))[::2]:
        if path.is_file():
            path.unlink()
    assert_goes_on(run, mesh)
    assert f"checkpoint {newest} of {run} is damaged" in capsys.readouterr().err
    assert [p.name for p in (run / "damaged").iterdir()] == [str(newest)]


STORE = "RESOURCE_EXHAUSTED: Error writing: No space left [os_error_code='28']"


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (FULL, "make room"),
        (OSError(errno.EDQUOT, "no room"), "make room"),
        (ValueError(STORE), "make room"),
        (PermissionError(errno.EACCES, "no"), "when it can be"),
        (ValueError("PERMISSION_DENIED: gs://bucket/a: HTTP 403"), "when it can be"),
        (ValueError("UNAVAILABLE: " + "long " * 1000), "when it can be"),
    ],
)
def test_errors_of_file_systems_are_one_message(error, hint):
    with pytest.raises(UserError) as found:
        with writing("runs/base"):
            raise error
    message = str(found.value)
    assert hint in message and "runs/base" in message and len(message) < 600


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Incompatible shapes"),
        UserError("NOTHING: of the kind"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as found:
        with writing("runs/base"):
            raise error
    assert found.value is error


def test_nothing_else_is_left_in_the_way(tmp_path, mesh):
    """What a killed process has not finished is removed when the run goes on."""
    run = tmp_path / "run"
    train(run, mesh)
    left = run / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "8", left)
    assert pathlib.Path(left).exists()
    assert_goes_on(run, mesh)
