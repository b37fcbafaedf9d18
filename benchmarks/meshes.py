"""Numbers of every mesh of eight devices, compared with those of one device.

XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0
--xla_cpu_use_fusion_emitters=false" JAX_PLATFORMS=cpu
python -m benchmarks.meshes [--stage=base64|sr256|sr1024]

The flags shorten compilation, which is most of it. Tiny forms of the paper's stages, in
float32, on all ways to spread eight devices over the axes of a mesh: losses and
gradients of a batch of 8, and images sampled in 4 steps. Prints a row per mesh: the
largest relative difference of an example's loss, the largest difference of a gradient
over the largest gradient, and the share of the images' 8-bit values that differ, with
their largest difference. Exit status 1 when a figure is out of bounds.
"""

import argparse
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
DEVICES, IMAGES = 8, 8
# Relative: float32 sums in another order.
BOUND = 1e-5
# Share of values that such a difference rounds to another of 255 levels.
APART = BOUND * 255


def tiny_form(name):
    """The stage's tiny form in float32, with one block at its first and last level.

    The first has no attention, the last that of the stage.
    """
    values = importlib.import_module(f"configs.{name}").get_config("tiny").to_dict()
    model = values["model"]
    for each in ("channels", "self_attention", "text_attention"):
        model[each] = model[each][:1] + model[each][-1:]
    model |= {"num_res_blocks": (1, 1), "dtype": "float32"}
    values["training"]["batch_size"] = IMAGES
    values["sampler"] |= {"steps": 4, "batch_size": IMAGES}
    return config.from_dict(values)


def random_batch(cfg):
    """A `Batch` of noise on the host, with captions of random lengths."""
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
    """Parameters without zeros, which would hide what lies before them."""
    params = nn.unbox(network.init(cfg, jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(next(keys), a.shape), params
    )


def run(cfg, params, batch, mesh):
    """Losses `[B]`, gradients and uint8 images on a mesh, as host arrays."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh).params)
    params = jax.device_put(params, shardings)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def gradients(params, batch):
        noised = noise_batch(batch, jax.random.key(0), cfg)
        return step.loss_and_gradients(params, noised, None, cfg)

    learn = jax.jit(sharding.on_mesh(gradients, mesh), out_shardings=(None, shardings))
    own = cascade.Settings.of(cfg.sampler, IMAGES)
    low = cfg.lowres_size
    small = np.random.default_rng(1).integers(0, 256, (IMAGES, low, low, 3), np.uint8)
    inputs = (
        np.arange(IMAGES, dtype=np.uint32),
        np.asarray(batch.text, np.float32),
        np.asarray(batch.mask),
        own.guidance.astype(np.float32),
        own.aug_level.astype(np.float32),
        small if low else None,
    )
    images, _ = cascade.compile_sampler(network.apply, cfg, mesh)(
        params, *jax.device_put(inputs, sharding.batch_sharding(mesh))
    )
    return jax.device_get((*learn(params, batch), images))


def compare(have, want):
    """The four figures of a row."""
    losses, gradients, images = have
    want_losses, want_gradients, want_images = want
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_gradients))
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), gradients, want_gradients)
    levels = np.abs(images.astype(int) - want_images)
    return (
        np.abs(losses / want_losses - 1).max(),
        max(jax.tree.leaves(off)) / largest,
        (levels > 0).mean(),
        levels.max(),
    )


def main():
    """Prints a row per stage and mesh, and the worst figures of each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append")
    stages = parser.parse_args().stage or STAGES
    bounds = np.asarray([BOUND, BOUND, APART, 1])
    meshes = [
        config.MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True)))
        for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES))
        if math.prod(sizes) == DEVICES
    ]
    print(f"| stage | {' | '.join(sharding.AXES)} | losses | gradients | images |")
    print("|---|" + "---|" * (len(sharding.AXES) + 3))
    failed, summary = 0, []
    for name in stages:
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
    """The figures as cells of a table."""
    losses, gradients, share, level = figures
    return f"{losses:.1e} | {gradients:.1e} | {share:.2%}, {level:.0f}"


if __name__ == "__main__":
    main()
