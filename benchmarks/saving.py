"""How long saving holds the loop, and what writing does to the steps beside it.

python benchmarks/saving.py [--rounds=7]

The demo's base, and a base of 26.7M parameters of 64 pixels (benchmarks/peers.py's) in
batches of 4, on random batches. Each round trains some quiet steps, waits for the
device, saves, trains until all is written, and goes on. A step is waited for.
"""

import argparse
import statistics
import tempfile
import time

import jax

from configs import tiny
from imagen_jax import config, timings
from imagen_jax.sharding import make_mesh
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import create_state
from imagen_jax.training.step import compile_train_step

LARGE = {
    "image_size": 64,
    "model": {
        "dtype": "float32",
        "head_channels": 64,
        "channels": (64, 128, 192, 256),
        "num_res_blocks": (2, 2, 2, 2),
        "self_attention": (False, False, True, True),
        "text_attention": (False, False, True, True),
    },
    "text": {"length": 32, "dim": 256},
    "training": {"batch_size": 4},
}
QUIET = 10


def measure(cfg, rounds):
    """`(bytes, {what: seconds})` of a stage."""
    mesh = make_mesh(cfg.mesh)
    state, batch = create_state(cfg, mesh), timings.random_batch(cfg, mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step = compile_train_step(cfg, mesh)
    found = {"quiet": [], "held": [], "first": [], "beside": [], "written": []}

    def train(name):
        nonlocal state
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        found[name].append(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as workdir:
        checkpointer = Checkpointer(workdir, cfg.training)
        for number in range(-1, rounds):
            for _ in range(QUIET):
                train("quiet")
            begun = time.perf_counter()
            checkpointer.save(state, cfg, b"", {})
            found["held"].append(time.perf_counter() - begun)
            train("first")
            while checkpointer.manager.is_saving_in_progress():
                train("beside")
            found["written"].append(time.perf_counter() - begun)
            if number < 0:
                # Compiling, and what is made once.
                for seconds in found.values():
                    seconds.clear()
        checkpointer.close()
    return size, found


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for name, cfg in (
        ("the demo's base", config.from_dict(tiny.base().to_dict())),
        ("base of 64 pixels", config.from_dict(LARGE)),
    ):
        size, found = measure(cfg, rounds)
        cells = [
            f"{1e3 * statistics.median(each):,.0f} "
            f"[{1e3 * min(each):,.0f}-{1e3 * max(each):,.0f}]"
            if each
            else "-"
            for each in found.values()
        ]
        print(f"| {name} | {size / 1e6:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
