"""A copy of the state beside the state, where the devices have room for it."""

import collections
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from imagen_jax.training.state import TrainState

# Free memory comes in pieces.
_ROOM = 1.25


@jax.jit
def copied(state: TrainState) -> TrainState:
    """What is left when `state` is donated to the next step."""
    return jax.tree.map(jnp.copy, state)


def fits_twice(state: TrainState) -> bool:
    """Whether the devices have room for a copy beside the most they ever held."""
    need: collections.Counter[jax.Device] = collections.Counter()
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            need[shard.device] += shard.data.nbytes
    return all(has_room(device.memory_stats(), size) for device, size in need.items())


def has_room(memory: Mapping[str, int] | None, size: int) -> bool:
    """Of a device with these `memory_stats`; a CPU has none, and the host's memory."""
    if memory is None:
        return True
    free = memory.get("bytes_limit", 0) - memory.get("peak_bytes_in_use", 0)
    return free > _ROOM * size
