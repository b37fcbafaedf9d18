"""How long saving holds the loop, and what writing does to the steps beside it.

python benchmarks/saving.py [--rounds=7]

The demo's base, and the same with 21.1M parameters in batches of 8, on random batches.
In turns the loop itself hands the state to Orbax, and a thread hands over a copy. Each
time some quiet steps are trained, then it is saved, and trained until all is written.
Each step is waited for, so that saving does not wait for steps.
"""

import argparse
import statistics
import tempfile
import time

import jax

from configs import tiny
from imagen_jax import benchmark, config
from imagen_jax.sharding import make_mesh
from imagen_jax.training import checkpoint
from imagen_jax.training.state import create_state
from imagen_jax.training.step import compile_train_step

QUIET = 8
WAYS = {"the loop": lambda state: False, "a thread": checkpoint.fits_twice}


def stages():
    """`(name, stage)`."""
    demo, large = tiny.base(), tiny.base()
    large.model.channels = (192, 288)
    large.training.batch_size = 8
    yield "the demo's base", config.from_dict(demo.to_dict())
    yield "21.1M parameters", config.from_dict(large.to_dict())


def measure(cfg, rounds):
    """`(bytes, {way: {what: seconds}})` of a stage."""
    mesh = make_mesh(cfg.mesh)
    state, batch = create_state(cfg, mesh), benchmark.random_batch(cfg, mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step = compile_train_step(cfg, mesh)
    whats = ("quiet", "first held", "held", "next", "beside", "written")
    found = {way: {what: [] for what in whats} for way in WAYS}

    def train(seconds):
        nonlocal state
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begun)

    train([])
    with tempfile.TemporaryDirectory() as workdir:
        checkpointer = checkpoint.Checkpointer(workdir, cfg.training)
        for number in range(rounds + 1):
            for way, fits in WAYS.items():
                checkpoint.fits_twice = fits
                own = found[way]
                for _ in range(QUIET):
                    train(own["quiet"])
                begun = time.perf_counter()
                checkpointer.save(state, cfg, b"", {})
                held = time.perf_counter() - begun
                own["held" if number else "first held"].append(held)
                train(own["next"])
                while _is_writing(checkpointer):
                    train(own["beside"])
                own["written"].append(time.perf_counter() - begun)
        checkpointer.close()
    return size, found


def _is_writing(checkpointer):
    handed = checkpointer._handed
    handing = handed is not None and not handed.done()
    return handing or checkpointer.manager.is_saving_in_progress()


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for name, cfg in stages():
        size, found = measure(cfg, rounds)
        for way, own in found.items():
            cells = [
                f"{1e3 * statistics.median(each):,.0f} "
                f"[{1e3 * min(each):,.0f}-{1e3 * max(each):,.0f}]"
                for each in own.values()
                if each
            ]
            row = f"{name}, {size / 1e6:,.0f} MB, {way}"
            print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
