"""Cascades of real networks: what a picture depends on, and by how much."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.batch import to_float
from imagen_jax.config import MeshConfig
from imagen_jax.diffusion import cascade
from imagen_jax.diffusion.loss import noise_batch
from imagen_jax.models import network
from tests import tiny

PICTURES = 6
ATTENTION = tiny.ONE_LEVEL | {"self_attention": (True,), "text_attention": (True,)}
CONFIGS = [
    tiny.stage(model=ATTENTION, sampler={"steps": 6, "guidance": 2.0}),
    tiny.sr_stage(model=tiny.ONE_LEVEL, sampler={"steps": 6, "guidance": 1.5}),
]


def _stage(cfg, mesh, batch_size=8):
    sampler = dataclasses.replace(cfg.sampler, batch_size=batch_size)
    params = jax.device_put(tiny.params(cfg), sharding.replicated(mesh))
    cfg = dataclasses.replace(cfg, sampler=sampler)
    return cascade.Stage(params=params, cfg=cfg, apply=network.apply)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    mask = np.arange(4) < rng.integers(1, 5, PICTURES)[:, None]
    text = rng.normal(size=(PICTURES, 4, 8)) * mask[..., None]
    return {
        "text": text.astype(np.float32),
        "mask": mask,
        "seeds": np.arange(40, 40 + PICTURES),
    }


def _run(inputs, cfg, rows, devices=1, batch_size=8, **axes):
    mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    lowres = np.random.default_rng(1).integers(0, 256, (PICTURES, 8, 8, 3), np.uint8)
    (made,), _ = cascade.sample_cascade(
        [_stage(cfg, mesh, batch_size)],
        **{name: values[rows] for name, values in inputs.items()},
        mesh=mesh,
        lowres=lowres[rows] if cfg.lowres_size else None,
    )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("cfg", CONFIGS, ids=["base", "sr"])
def test_a_picture_is_its_own(inputs, cfg):
    """In one program to the bit; another batch size or mesh is another program."""
    everyone = np.arange(PICTURES)
    want = _run(inputs, cfg, everyone)
    assert len(np.unique(want.reshape(PICTURES, -1), axis=0)) == PICTURES
    moved = np.array([4, 4, 0, 5, 1, 2, 3])
    np.testing.assert_array_equal(_run(inputs, cfg, moved), want[moved])
    np.testing.assert_array_equal(_run(inputs, cfg, [3, 4]), want[[3, 4]])
    assert np.abs(_run(inputs, cfg, [3]).astype(int) - want[[3]]).max() <= 1
    for others in (
        {"batch_size": 2},
        {"devices": 8, "fsdp": 2, "spatial": 2, "tensor": 2},
    ):
        made = _run(inputs, cfg, everyone, **others)
        # Sums are in another order. Their roundings, 1e-7, grow by at most some
        # hundreds over these steps, far less than the 8e-3 between two levels: a value
        # that lies between two may fall to either.
        difference = np.abs(made.astype(int) - want)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01, others


def _cubic(distance):
    """Keys' kernel of weight -1/2 at a distance of up to 2."""
    x = np.abs(distance)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, far)


@pytest.mark.slow
def test_the_networks_input_carries_the_noise_that_it_is_told():
    """Inside the network, where pixels and level arrive: in training and in sampling.

    Of grey pictures only the noise is left. Doubling a picture bicubically leaves each
    pixel a weighted sum of 4 x 4, so of the noise's variance the sum of the squared
    weights.
    """
    cfg = tiny.sr_stage(
        model=tiny.ONE_LEVEL, training={"batch_size": 32}, sampler={"steps": 1}
    )
    cfg = dataclasses.replace(cfg, image_size=64, lowres_size=32)
    params = tiny.params(cfg)
    kept = np.square(_cubic(np.array([-1.25, -0.25, 0.75, 1.75]))).sum() ** 2
    grey = float(to_float(jnp.uint8(128)))
    seen = {}

    def keep(name, value):
        seen[name] = np.asarray(value)

    def arrive(call, args, kwargs, context):
        if context.module.name == "conv_in":
            jax.debug.callback(functools.partial(keep, "pixels"), args[0])
        if context.module.name == "embedding":
            jax.debug.callback(functools.partial(keep, "told"), args[1].aug_logsnr)
        return call(*args, **kwargs)

    def apply(*args):
        with nn.intercept_methods(arrive):
            return network.apply(*args)

    def check(rows):
        jax.effects_barrier()
        assert len(np.unique(seen["told"])) == rows
        alpha = (1 + np.exp(-seen["told"])) ** -0.5
        sigma = (1 + np.exp(seen["told"])) ** -0.5
        # Away from the edge, where weights are others.
        noise = seen["pixels"][:, 4:-4, 4:-4, 3:] - alpha[:, None, None, None] * grey
        ratio = noise.var((1, 2, 3)) / (kept * sigma**2)
        # A quarter as many values are independent; five standard errors.
        assert np.abs(ratio - 1).max() < 5 * np.sqrt(2 / (noise[0].size / 4))

    batch = tiny.batch(cfg).replace(image=np.full((32, 64, 64, 3), 128, np.uint8))
    noised = noise_batch(batch, jax.random.key(0), cfg)
    jax.jit(apply, static_argnums=0)(
        cfg.model, params, noised.z, noised.logsnr, noised.cond
    )
    check(32)

    own = cascade.Settings.of(cfg.sampler, 8)
    own.aug_level[:] = np.linspace(0.05, 1, 8)
    cascade.sample_cascade(
        [cascade.Stage(params=params, cfg=cfg, apply=apply)],
        text=np.zeros((8, 4, 8), np.float32),
        mask=np.ones((8, 4), bool),
        seeds=np.arange(8),
        mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
        lowres=np.full((8, 32, 32, 3), 128, np.uint8),
        settings=[own],
    )
    check(8)
