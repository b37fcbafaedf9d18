"""Checks that every mesh of eight devices computes what one device does.

XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0
--xla_cpu_use_fusion_emitters=false" JAX_PLATFORMS=cpu
python benchmarks/meshes.py [--stage=base64|sr256|sr1024]

(The flags shorten compiling, which is most of it.) Of tiny forms of the
paper's stages, in float32, all ways to spread eight devices over the axes of a mesh:
losses and gradients of a batch of 8, and pictures sampled in 4 steps. A row per mesh:
the largest relative difference of an example's loss, the largest difference of a
gradient over the largest gradient, and of the pictures' 8-bit values the share that
differs and by how much at most. Exit status 1 when one is out of bounds.
"""

import argparse
import functools
import importlib
import itertools
import math
import sys

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
# Float32 sums in another order.
BOUND = 1e-5
# Of values so far apart, of a range of 255 levels, so many are rounded the other way.
APART = BOUND * 255


def tiny_form(name):
    """The stage's tiny form in float32, of a block at each of its outer levels.

    The finest has no attention, the coarsest the stage's. Other blocks are as these.
    """
    values = importlib.import_module(f"configs.{name}").get_config("tiny").to_dict()
    model = values["model"]
    for each in ("channels", "self_attention", "text_attention"):
        model[each] = model[each][:1] + model[each][-1:]
    model |= {"num_res_blocks": (1, 1), "dtype": "float32"}
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
        return step.loss_and_gradients(params, noised, None, cfg)

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


def compare(have, want):
    """The four figures of a row, as the top of this file tells."""
    losses, gradients, pictures = have
    want_losses, want_gradients, want_pictures = want
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_gradients))
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), gradients, want_gradients)
    levels = np.abs(pictures.astype(int) - want_pictures)
    return (
        np.abs(losses / want_losses - 1).max(),
        max(jax.tree.leaves(off)) / largest,
        (levels > 0).mean(),
        levels.max(),
    )


def main():
    """Prints a row per stage and mesh, and the worst of each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append")
    bounds = np.asarray([BOUND, BOUND, APART, 1])
    meshes = [
        config.MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True)))
        for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES))
        if math.prod(sizes) == DEVICES
    ]
    print(f"| stage | {' | '.join(sharding.AXES)} | losses | gradients | pictures |")
    print("|---|" + "---|" * (len(sharding.AXES) + 3))
    failed, summary = 0, []
    for name in parser.parse_args().stage or STAGES:
        cfg = tiny_form(name)
        params, batch = random_params(cfg), random_batch(cfg)
        one = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
        want, worst = run(cfg, params, batch, one), np.zeros(4)
        for mesh_cfg in meshes:
            mesh = sharding.make_mesh(mesh_cfg, jax.devices()[:DEVICES])
            found = np.asarray(compare(run(cfg, params, batch, mesh), want))
            failed += not (found <= bounds).all()
            worst = np.maximum(worst, found)
            axes = " | ".join(str(getattr(mesh_cfg, axis)) for axis in sharding.AXES)
            print(f"| {name} | {axes} | {row(found)} |", flush=True)
            jax.clear_caches()
        summary.append(f"| {name} | {len(meshes)} meshes | | | | {row(worst)} |")
    print("\n".join([*summary, f"| bounds | | | | | {row(bounds)} |"]))
    if failed:
        sys.exit(f"{failed} meshes are out of bounds")


def row(figures):
    """As cells of a table."""
    losses, gradients, share, level = figures
    return f"{losses:.1e} | {gradients:.1e} | {share:.2%}, {level:.0f}"


if __name__ == "__main__":
    main()
