"""Batches as numpy arrays, to compare them."""

import itertools

import jax
import numpy as np


def take(stream, n):
    return [jax.tree.map(np.asarray, batch) for batch in itertools.islice(stream, n)]


def ids(batches):
    return np.concatenate([batch.id for batch in batches]).tolist()


def by_id(batches):
    return {
        int(id): jax.tree.map(lambda x, i=i: x[i], batch)
        for batch in batches
        for i, id in enumerate(batch.id)
    }


def assert_equal(have, want):
    assert len(have) == len(want)
    jax.tree.map(np.testing.assert_array_equal, have, want)
