"""What saving leaves to a thread: the state may change under it, errors come up."""

import functools
import threading

import jax
import numpy as np
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.sharding import make_mesh
from imagen_jax.training import checkpoint
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.copying import has_room
from imagen_jax.training.state import create_state
from tests import tiny

CFG = tiny.stage(model=tiny.ONE_LEVEL)


@functools.partial(jax.jit, donate_argnums=0)
def spoil(state):
    """Another state in the same memory."""
    return jax.tree.map(lambda leaf: (leaf + 1).astype(leaf.dtype), state)


@pytest.mark.parametrize(("devices", "room"), [(1, True), (1, False), (8, True)])
def test_what_is_saved_is_what_was_there(tmp_path, monkeypatch, devices, room):
    """Whatever the steps after it do to its memory, before Orbax has seen it."""
    if not room:
        monkeypatch.setattr(checkpoint, "fits_twice", lambda state: False)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    state = create_state(CFG, mesh)
    checkpointer = Checkpointer(str(tmp_path), CFG.training)
    want, begun, threads = {}, threading.Event(), []
    save = checkpointer.manager.save

    def late(*args, **kwargs):
        threads.append(threading.current_thread())
        if room:
            assert begun.wait(60)
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpointer.manager, "save", late)
    for step in (0, 3):
        begun.clear()
        want[step] = jax.tree.map(np.array, state)
        checkpointer.save(state, CFG, b"here")
        for _ in range(3):
            state = spoil(state)
        jax.block_until_ready(state)
        begun.set()
        checkpointer.wait()
        found, position = checkpointer.restore(CFG, mesh)
        for a, b in zip(
            jax.tree.leaves(found), jax.tree.leaves(want[step]), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        assert position == b"here"
    assert {thread is threading.main_thread() for thread in threads} == {not room}
    checkpointer.close()


def test_an_error_of_the_thread_is_one_of_the_loop(tmp_path, monkeypatch):
    """At the next save, or at the end; and the checkpoint before stays."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(CFG, mesh)
    checkpointer = Checkpointer(str(tmp_path), CFG.training)
    checkpointer.save(state, CFG, b"")
    checkpointer.wait()

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(checkpointer.manager, "save", fail)
    state = spoil(state)
    checkpointer.save(state, CFG, b"")
    with pytest.raises(OSError, match="no space left"):
        checkpointer.save(state, CFG, b"")
    checkpointer.save(state, CFG, b"")
    with pytest.raises(OSError, match="no space left"):
        checkpointer.close()
    assert Checkpointer(str(tmp_path)).newest() == 0


@pytest.mark.parametrize(
    ("memory", "has"),
    [
        (None, True),
        ({"bytes_limit": 1000, "peak_bytes_in_use": 800}, True),
        ({"bytes_limit": 1000, "peak_bytes_in_use": 900}, False),
        # Of a device that tells nothing nothing is known.
        ({}, False),
    ],
)
def test_a_copy_is_made_where_there_is_room(memory, has):
    assert has_room(memory, 100) == has
