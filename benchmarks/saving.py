"""Time for which saving holds the loop, and of the steps beside the writing.

python -m benchmarks.saving [--rounds=7]

The demo's base, and the same with 21.1M parameters in batches of 8, on random batches.
Each round trains some quiet steps, saves, and trains until everything is written. Each
step is waited for, so that saving does not wait for steps.
"""

import argparse
import statistics
import tempfile
import time

import jax

from imagen_jax import benchmark, config
from imagen_jax.configs import tiny
from imagen_jax.sharding import make_mesh
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import create_state
from imagen_jax.training.step import compile_train_step

QUIET_STEPS = 8


def stages():
    """Names and configs of the stages."""
    demo, large = tiny.base(), tiny.base()
    large.model.channels = (192, 288)
    large.training.batch_size = 8
    yield "the demo's base", config.from_dict(demo.to_dict())
    yield "21.1M parameters", config.from_dict(large.to_dict())


def measure(cfg, rounds):
    """`(bytes, {what: seconds})` of a stage."""
    mesh = make_mesh(cfg.mesh)
    state, batch = create_state(cfg, mesh), benchmark.random_batch(cfg, mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step = compile_train_step(cfg, mesh)
    names = ("quiet", "first held", "held", "next", "beside", "written")
    found = {name: [] for name in names}

    def train(seconds):
        nonlocal state
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begun)

    train([])
    with tempfile.TemporaryDirectory() as workdir:
        checkpointer = Checkpointer(workdir, cfg.training)
        for number in range(rounds + 1):
            for _ in range(QUIET_STEPS):
                train(found["quiet"])
            begun = time.perf_counter()
            checkpointer.save(state, cfg, b"", {})
            held = time.perf_counter() - begun
            found["held" if number else "first held"].append(held)
            train(found["next"])
            while checkpointer.manager.is_saving_in_progress():
                train(found["beside"])
            found["written"].append(time.perf_counter() - begun)
        checkpointer.close()
    return size, found


def main():
    """Prints a row per stage, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for name, cfg in stages():
        size, found = measure(cfg, rounds)
        cells = [
            f"{1e3 * statistics.median(each):,.0f} "
            f"[{1e3 * min(each):,.0f}-{1e3 * max(each):,.0f}]"
            for each in found.values()
            if each
        ]
        print(f"| {name}, {size / 1e6:,.0f} MB | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
