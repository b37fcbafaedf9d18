"""The Efficient U-Net against the plain one: equal parameters, in turns.

python benchmarks/efficient_unet.py

64 to 256 pixels, one picture, float32: sr256's levels and blocks at a quarter of their
width (36.0M parameters), and a U-Net of ADM's kind, three blocks a level, 35.7M. Both
attend at their coarsest level.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from configs import sr256
from imagen_jax import benchmark, config
from imagen_jax.compilation import compiler_options
from imagen_jax.models import network
from imagen_jax.planning.compile import compile_step
from imagen_jax.planning.flops import forward_flops
from imagen_jax.sharding import make_mesh
from imagen_jax.training.state import create_state

SHAPES = {
    "efficient_unet": {"width": 32, "num_res_blocks": (2, 4, 8, 8), "heads": 4},
    "unet": {"width": 40, "num_res_blocks": (3, 3, 3, 3), "heads": 8},
}
ROUNDS, STEPS = 5, 3


def stage(architecture):
    """The stage with one of the two networks."""
    shape = SHAPES[architecture]
    widths = tuple(shape["width"] * m for m in (1, 2, 4, 8))
    values = sr256.get_config().to_dict()
    values["model"] |= {
        "architecture": architecture,
        "channels": widths,
        "num_res_blocks": shape["num_res_blocks"],
        "head_channels": widths[-1] // shape["heads"],
        "dtype": "float32",
        "scan_blocks": False,
        "remat": "none",
    }
    values["text"] = {"length": 32, "dim": 256}
    values["training"]["batch_size"] = 1
    return config.from_dict(values)


def runs(cfg, mesh):
    """`(forward, train)`, each to be called and waited for."""
    train_step = compile_step(cfg, mesh)[0]
    state, batch = create_state(cfg, mesh), benchmark.random_batch(cfg, mesh)
    inputs = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype), network.abstract_inputs(cfg)[1:]
    )
    apply = jax.jit(
        network.apply,
        static_argnums=0,
        compiler_options=compiler_options(mesh),
    )

    def forward():
        apply(cfg.model, state.params, *inputs).block_until_ready()

    def train():
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)

    return {"forward": forward, "train": train}


def main():
    """Times both, in turns."""
    mesh = make_mesh(config.MeshConfig())
    stages = {name: stage(name) for name in SHAPES}
    made = {name: runs(cfg, mesh) for name, cfg in stages.items()}
    seconds = {(name, what): [] for name in made for what in made[name]}
    for turn in range(ROUNDS + 1):
        for name, what in seconds:
            for _ in range(STEPS):
                start = time.perf_counter()
                made[name][what]()
                if turn:
                    seconds[name, what].append(time.perf_counter() - start)
    for (name, what), times in seconds.items():
        size = benchmark.params(stages[name])["parameters"] / 1e6
        flops = forward_flops(stages[name]) / 1e9
        milliseconds = [1e3 * f(times) for f in (statistics.median, min, max)]
        print(
            f"{name} {what}: {size:.1f}M parameters, {flops:.1f} GFLOP forward, "
            "{:.0f} ms [{:.0f}-{:.0f}]".format(*milliseconds)
        )


if __name__ == "__main__":
    main()
