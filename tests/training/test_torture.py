"""The short form of benchmarks/torture.py: two kills of a real run."""

import os
import pathlib

import pytest

from benchmarks.torture import Torture

PLAN = [("kill", "saving"), ("int twice", "saving")]


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_run_that_was_not(tmp_path):
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).absolute()
    torture = Torture(tmp_path, steps=24, every=4, seed=0, cache=cache)
    killed = torture.until_done(tmp_path / "run", PLAN)
    assert not torture.faults, "\n".join(torture.faults)
    # The last may come when all is done.
    assert killed >= len(PLAN) - 1, torture.hits
