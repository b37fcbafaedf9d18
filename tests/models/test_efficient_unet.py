"""The 1024 stage trains on crops and is applied to the whole picture.

It has convolutions, normalisation over each picture and channel group, and attention
of single pixels to the text. So far from the crop's edge the whole picture's answer is
the crop's, but for the mean and variance that its group normalisations take over more
pixels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import config
from imagen_jax.batch import Cond
from imagen_jax.configs import sr1024
from imagen_jax.models import layers, network

CROP, WHOLE = 192, 384
# How far a pixel reaches: the first convolution 1; each level at 1 / s of the size
# 1 or 2 * s for its resampling and 2 * s for each of its blocks, down and up.
REACH = 1 + sum(2 * s + 2 * 2 * s for s in (2, 4, 8))


def _stage():
    values = sr1024.get_config("tiny").to_dict()
    values["model"] |= {"num_res_blocks": (1, 1, 1), "channels": (16, 16, 32)}
    return config.from_dict(values)


def _inputs(cfg):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=(1, *shape)), jnp.float32)

    ratio = cfg.image_size // cfg.lowres_size
    cond = Cond(
        text=normal(cfg.text.length, cfg.text.dim),
        mask=jnp.ones((1, cfg.text.length), bool),
        lowres=normal(WHOLE // ratio, WHOLE // ratio, 3),
        aug_logsnr=normal(),
    )
    return normal(WHOLE, WHOLE, 3), normal(), cond


def _cut(x, start, size):
    return x[:, start : start + size, start : start + size]


@pytest.mark.slow
def test_far_from_its_edge_a_crop_is_the_whole_picture():
    cfg = _stage()
    shapes = jax.eval_shape(lambda: network.init(cfg, jax.random.key(0)))
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(
            random.normal(size=leaf.shape) / np.prod(leaf.shape) ** 0.25, jnp.float32
        ),
        nn.unbox(shapes),
    )
    z, logsnr, cond = _inputs(cfg)
    start = CROP // 2  # a multiple of all strides
    ratio = cfg.image_size // cfg.lowres_size
    small = cond.replace(lowres=_cut(cond.lowres, start // ratio, CROP // ratio))

    own, seen = layers.GroupNorm.moments, {}

    def run(moments, z, cond):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers.GroupNorm, "moments", moments)
            return network.apply(cfg.model, params, z, logsnr, cond)

    def noted(module, x):
        assert module.path not in seen
        seen[module.path] = own(module, x)
        return seen[module.path]

    def given(module, x):
        return seen[module.path]

    # Not jitted: the moments of the first run are constants of the second.
    whole = run(noted, z, cond)
    assert len(seen) > 10
    inner = CROP - 2 * REACH
    assert inner >= 16
    want = np.asarray(_cut(whole, start + REACH, inner))

    def difference(crop):
        inside = np.asarray(_cut(crop, REACH, inner))
        return np.abs(inside - want).max() / np.abs(whole).max()

    # A few hundred roundings on the way.
    rounding = 300 * np.finfo(np.float32).eps
    assert difference(run(given, _cut(z, start, CROP), small)) < rounding
    # With the crop's own moments: of the 24 x 24 pixels and 4 channels of a group at
    # the coarsest level, each variance is off by some 3 %.
    plain = run(own, _cut(z, start, CROP), small)
    assert rounding < difference(plain) < 0.03
