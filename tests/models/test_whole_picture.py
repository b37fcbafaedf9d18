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

from configs import sr1024
from imagen_jax import config
from imagen_jax.batch import Cond
from imagen_jax.models import network

CROP, WHOLE = 192, 768
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
    start = 2 * CROP  # a multiple of all strides
    ratio = cfg.image_size // cfg.lowres_size
    small = cond.replace(lowres=_cut(cond.lowres, start // ratio, CROP // ratio))

    def run(normalise):
        def intercept(call, args, kwargs, context):
            if isinstance(context.module, nn.GroupNorm):
                return normalise(context.module, *args)
            return call(*args, **kwargs)

        def apply(z, cond):
            with nn.intercept_methods(intercept):
                return network.apply(cfg.model, params, z, logsnr, cond)

        return apply

    seen = {}

    def moments(x, groups):
        x = x.reshape(*x.shape[:-1], groups, -1)
        mean = x.mean((1, 2, 4), keepdims=True)
        return mean, x.var((1, 2, 4), keepdims=True)

    def normalised(module, x, mean, variance):
        grouped = x.reshape(*x.shape[:-1], module.num_groups, -1)
        grouped = (grouped - mean) * jax.lax.rsqrt(variance + module.epsilon)
        out = grouped.reshape(x.shape)
        if module.use_scale:
            values = module.variables["params"]
            out = out * values["scale"] + values["bias"]
        return out

    def own(module, x):
        assert module.path not in seen
        seen[module.path] = moments(x, module.num_groups)
        return normalised(module, x, *seen[module.path])

    def given(module, x):
        return normalised(module, x, *seen[module.path])

    # Not jitted: the moments of the first run are constants of the second.
    whole = run(own)(z, cond)
    assert len(seen) > 10
    inner = CROP - 2 * REACH
    assert inner >= 16
    want = np.asarray(_cut(whole, start + REACH, inner))

    def difference(crop):
        inside = np.asarray(_cut(crop, REACH, inner))
        return np.abs(inside - want).max() / np.abs(whole).max()

    # A few hundred roundings on the way.
    rounding = 300 * np.finfo(np.float32).eps
    assert difference(run(given)(_cut(z, start, CROP), small)) < rounding
    # With the crop's own moments: of the 24 x 24 pixels and 4 channels of a group at
    # the coarsest level, each variance is off by some 3 %.
    seen.clear()
    own_moments = run(own)(_cut(z, start, CROP), small)
    assert rounding < difference(own_moments) < 0.03
    plain = network.apply(cfg.model, params, _cut(z, start, CROP), logsnr, small)
    np.testing.assert_allclose(own_moments, plain, atol=rounding * np.abs(plain).max())
