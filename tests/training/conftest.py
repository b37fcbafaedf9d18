"""A loop without a network's arithmetic, for tests of what is around it."""

import functools

import jax
import numpy as np
import pytest

from imagen_jax.training import loop
from imagen_jax.training.metrics import MEANS, bucket_names
from imagen_jax.training.state import create_state

_created = functools.cache(create_state)


def _step(state, batch):
    """Moves every parameter by what depends on the step and the batch."""
    moved = (np.float32(state.step) + batch.id.sum()) / 64
    buckets = np.zeros(len(bucket_names()))
    metrics = {
        **dict.fromkeys(MEANS, jax.numpy.ones(())),
        "loss_by_logsnr": {"sum": buckets, "count": buckets},
        **dict.fromkeys(("skipped", "budget_spent"), False),
        "skipped_updates": 0,
    }
    params = jax.tree.map(lambda leaf: leaf + moved, state.params)
    return state.replace(step=state.step + 1, params=params), metrics


@pytest.fixture
def no_arithmetic(monkeypatch):
    """Steps compile nothing; every run starts from the same state."""
    monkeypatch.setattr(loop, "compile_train_step", lambda *args: _step)
    monkeypatch.setattr(loop, "create_state", _created)
