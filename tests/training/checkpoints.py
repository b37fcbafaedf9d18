"""Small checkpoints, and damage to them, for tests."""

import functools

import jax
import numpy as np

from imagen_jax.config import MeshConfig
from imagen_jax.sharding import make_mesh
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import abstract_state
from tests import tiny

CFG = tiny.stage(model=tiny.ONE_LEVEL)


@functools.cache
def mesh(devices=1):
    return make_mesh(MeshConfig(), jax.devices()[:devices])


def state(step, devices=1):
    """Numbers that differ from leaf to leaf and from step to step."""
    rng = np.random.default_rng(step)

    def draw(leaf):
        drawn = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(drawn, leaf.sharding)

    like = abstract_state(CFG, mesh(devices))
    return jax.tree.map(draw, like).replace(step=jax.numpy.int32(step))


def save(workdir, steps):
    checkpointer = Checkpointer(str(workdir), CFG.training)
    for step in steps:
        checkpointer.save(state(step), CFG, b"at %d" % step)
    checkpointer.close()


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder):
    """The file that holds the most numbers of arrays."""
    return max(folder.glob("ocdbt.process_*/d/*"), key=lambda p: p.stat().st_size)
