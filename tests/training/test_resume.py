"""Resumed on other devices: the same examples, and numbers up to their sums."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from imagen_jax import prepare
from imagen_jax.config import MeshConfig
from imagen_jax.data.pipeline import open_records, open_sources
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop
from tests import tiny

STEPS = 8


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Epochs end within batches: 20 examples, 8 in a batch."""
    path = str(tmp_path_factory.mktemp("records") / "records.npz")
    options = {"image_size": 8, "text_length": 4, "progress": False}
    prepare.prepare("shapes:20", path, **options)
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL,
        data={"records": path},
        text={"length": 4, "dim": 64, "encoder": ""},
        # Saved at the end of each part only.
        training={"checkpoint_every_steps": 100},
    )
    return tiny.with_steps(open_sources(cfg)[0], STEPS)


class Noted(Iterator):
    """A source that remembers the ids of its batches."""

    def __init__(self, stream, ids):
        self.stream, self.ids = stream, ids
        self.get_state, self.set_state = stream.get_state, stream.set_state

    def __next__(self):
        batch = next(self.stream)
        self.ids.append(np.asarray(batch.id).tolist())
        return batch


MESHES = {8: MeshConfig(fsdp=2), 4: MeshConfig()}


@functools.cache
def mesh(devices):
    return make_mesh(MESHES[devices], jax.devices()[:devices])


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(cfg):
    """How long a run is is in no program."""
    make = loop.compile_train_step
    compiled = functools.cache(lambda own: make(cfg, own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_step", lambda _, own, *args: compiled(own))
        yield


def train(cfg, workdir, devices, steps, ids):
    cfg = tiny.with_steps(cfg, steps)
    batches = Noted(open_records(cfg, mesh(devices)), ids)
    return jax.device_get(loop.train(cfg, str(workdir), batches, mesh(devices)))


@pytest.mark.slow
def test_other_devices_midway(cfg, tmp_path):
    """8, 4, 8 devices. Within 1e-4 of each array's norm: sums of another order."""
    whole, parts, same = [], [], []
    want = train(cfg, tmp_path / "whole", 8, STEPS, whole)
    for devices, steps in ((8, 2), (4, 5), (8, STEPS)):
        found = train(cfg, tmp_path / "parts", devices, steps, parts)
    assert parts == whole and len(whole) == STEPS
    far = {}
    for tree in ("params", "ema"):
        leaves = jax.tree.leaves_with_path(getattr(want, tree))
        for (path, x), y in zip(leaves, jax.tree.leaves(getattr(found, tree))):
            error = np.linalg.norm(x - y) / np.linalg.norm(x)
            if error > 1e-4:
                far[tree + jax.tree_util.keystr(path)] = error
    assert not far
    # On the same devices there is nothing to allow for.
    train(cfg, tmp_path / "same", 8, 4, same)
    found = train(cfg, tmp_path / "same", 8, STEPS, same)
    assert same == whole
    for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(x, y)
