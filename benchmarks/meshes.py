"""Checks that every mesh of eight devices computes what one device does.

XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
JAX_PLATFORMS=cpu python benchmarks/meshes.py [--stage=base64|sr256|sr1024]

Of the tiny forms of the paper's stages, in float32, all ways to spread eight devices
over the axes of a mesh: losses and gradients of a batch of 8, and pictures sampled in 4
steps. A row per mesh: the largest relative difference of an example's loss, the largest
difference of a gradient over the largest gradient, and of the pictures' 8-bit values
the share that differs and by how much at most.
"""

import argparse
import functools
import importlib
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import config, sharding
from imagen_jax.batch import Batch, batch_spec
from imagen_jax.diffusion import cascade
from imagen_jax.diffusion.loss import noise_batch
from imagen_jax.models import network
from imagen_jax.training import step
from imagen_jax.training.state import abstract_state

STAGES = ("base64", "sr256", "sr1024")
DEVICES, PICTURES = 8, 8


def tiny_form(name):
    """The stage's tiny form in float32, which samples in few steps."""
    values = importlib.import_module(f"configs.{name}").get_config("tiny").to_dict()
    values["model"] |= {"dtype": "float32", "scan_blocks": False}
    values["training"]["batch_size"] = PICTURES
    values["sampler"] |= {"steps": 4, "batch_size": PICTURES}
    return config.from_dict(values)


def random_batch(cfg):
    """Random pictures, captions of several lengths."""
    rng = np.random.default_rng(0)
    spec = batch_spec(cfg)
    rows, length, _ = spec.text.shape
    mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    return Batch(
        image=rng.integers(0, 256, spec.image.shape, dtype=np.uint8),
        text=(rng.normal(size=spec.text.shape) * mask[..., None]).astype(jnp.bfloat16),
        mask=mask,
        id=np.arange(rows, dtype=np.int32),
    )


def random_params(cfg):
    """Parameters of which none is zero: what starts at zero hides what is before it."""
    params = nn.unbox(network.init(cfg, jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(next(keys), a.shape), params
    )


def run(cfg, params, batch, mesh):
    """Losses, gradients and pictures, on the host."""
    lie = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh).params)
    params = jax.device_put(params, lie)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def gradients(params, batch):
        noised = noise_batch(batch, jax.random.key(0), cfg)
        return step._gradients(params, noised, None, cfg)

    learn = jax.jit(sharding.on_mesh(gradients, mesh), out_shardings=(None, lie))
    own = cascade.Settings.of(cfg.sampler, PICTURES)
    low = cfg.lowres_size
    small = np.random.default_rng(1).integers(0, 256, (PICTURES, low, low, 3), np.uint8)
    inputs = (
        np.arange(PICTURES, dtype=np.uint32),
        np.asarray(batch.text, np.float32),
        np.asarray(batch.mask),
        own.guidance.astype(np.float32),
        own.aug_level.astype(np.float32),
        small if low else None,
    )
    sample = functools.partial(cascade.sample_stage, apply=network.apply, cfg=cfg)
    pictures, _ = jax.jit(sharding.on_mesh(sample, mesh))(
        params, *jax.device_put(inputs, sharding.batch_sharding(mesh))
    )
    return jax.device_get((*learn(params, batch), pictures))


def main():
    """Prints a row per stage and mesh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append")
    meshes = [
        config.MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True)))
        for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES))
        if math.prod(sizes) == DEVICES
    ]
    print(f"| stage | {' | '.join(sharding.AXES)} | losses | gradients | pictures |")
    print("|---|" + "---|" * (len(sharding.AXES) + 3))
    for name in parser.parse_args().stage or STAGES:
        cfg = tiny_form(name)
        params, batch = random_params(cfg), random_batch(cfg)
        one = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
        losses, gradients, pictures = run(cfg, params, batch, one)
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
        for mesh_cfg in meshes:
            mesh = sharding.make_mesh(mesh_cfg, jax.devices()[:DEVICES])
            own_losses, own_gradients, own_pictures = run(cfg, params, batch, mesh)
            off = max(
                np.abs(a - b).max()
                for a, b in zip(
                    jax.tree.leaves(own_gradients),
                    jax.tree.leaves(gradients),
                    strict=True,
                )
            )
            figures = (
                np.abs(own_losses / losses - 1).max(),
                off / largest,
            )
            levels = np.abs(own_pictures.astype(int) - pictures)
            axes = " | ".join(str(getattr(mesh_cfg, axis)) for axis in sharding.AXES)
            shown = " | ".join(f"{figure:.1e}" for figure in figures)
            apart = f"{(levels > 0).mean():.2%}, {levels.max()}"
            print(f"| {name} | {axes} | {shown} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
