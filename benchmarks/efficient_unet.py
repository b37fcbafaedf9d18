"""Speed of the Efficient U-Net beside a U-Net with as many parameters.

python -m benchmarks.efficient_unet

64 to 256 pixels, one image, float32, in turns: sr256's levels and blocks at a quarter
of their width (36.0M parameters), and an ADM U-Net with three blocks a level (35.7M).
Both attend at their coarsest level.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from imagen_jax import benchmark, config
from imagen_jax.compilation import compiler_options
from imagen_jax.configs import sr256
from imagen_jax.models import network
from imagen_jax.planning.program import forward_flops
from imagen_jax.sharding import make_mesh
from imagen_jax.training.state import create_state
from imagen_jax.training.step import compile_train_step

SHAPES = {
    "efficient_unet": {"width": 32, "num_res_blocks": (2, 4, 8, 8), "heads": 4},
    "unet": {"width": 40, "num_res_blocks": (3, 3, 3, 3), "heads": 8},
}
ROUNDS, STEPS = 5, 3


def stage(architecture):
    """sr256 with one of the two networks."""
    shape = SHAPES[architecture]
    widths = tuple(shape["width"] * m for m in (1, 2, 4, 8))
    values = sr256.get_config().to_dict()
    values["model"] |= {
        "architecture": architecture,
        "channels": widths,
        "num_res_blocks": shape["num_res_blocks"],
        "head_channels": widths[-1] // shape["heads"],
        "dtype": "float32",
        "remat": "none",
    }
    values["text"] = {"length": 32, "dim": 256}
    values["training"]["batch_size"] = 1
    return config.from_dict(values)


def runs(cfg, mesh):
    """A forward pass and a training step by name, and the number of parameters."""
    train_step = compile_train_step(cfg, mesh)
    state, batch = create_state(cfg, mesh), benchmark.random_batch(cfg, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    inputs = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype), network.abstract_inputs(cfg)[1:]
    )
    apply = jax.jit(
        network.apply,
        static_argnums=0,
        compiler_options=compiler_options(mesh, cfg.model.dtype),
    )

    def forward():
        apply(cfg.model, state.params, *inputs).block_until_ready()

    def train():
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)

    return {"forward": forward, "train": train}, parameters


def main():
    """Prints a line per network and program."""
    mesh = make_mesh(config.MeshConfig())
    stages = {name: stage(name) for name in SHAPES}
    programs, sizes = {}, {}
    for name, cfg in stages.items():
        programs[name], sizes[name] = runs(cfg, mesh)
    seconds = {(name, what): [] for name in programs for what in programs[name]}
    for turn in range(ROUNDS + 1):
        for name, what in seconds:
            for _ in range(STEPS):
                start = time.perf_counter()
                programs[name][what]()
                if turn:
                    seconds[name, what].append(time.perf_counter() - start)
    for (name, what), times in seconds.items():
        flops = forward_flops(stages[name]) / 1e9
        milliseconds = [1e3 * f(times) for f in (statistics.median, min, max)]
        print(
            f"{name} {what}: {sizes[name] / 1e6:.1f}M parameters, "
            f"{flops:.1f} GFLOP forward, "
            "{:.0f} ms [{:.0f}-{:.0f}]".format(*milliseconds)
        )


if __name__ == "__main__":
    main()
