"""Layers against closed forms in float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import DiffusionConfig
from imagen_jax.diffusion.schedule import logsnr_schedule
from imagen_jax.models import layers

EPS = np.finfo(np.float32).eps
KEY = np.array([0, 1], np.uint32)


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "groups"), [(48, 12), (64, 16), (6, 1), (192, 32)]
)
def test_group_norm(channels, groups):
    # Off centre and out of scale, so that both are seen to go.
    x = 3 + 5 * _normal(2, 4, 5, channels)
    scale, bias = _normal(2, channels, seed=1)
    norm = layers.group_norm(channels, jnp.float32)
    have = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
    grouped = x.astype(np.float64).reshape(2, 20, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = grouped.var((1, 3), keepdims=True)
    want = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    # Statistics of values up to 25 with a deviation of 5; 60 terms in a sum.
    np.testing.assert_allclose(have, want * scale + bias, atol=60 * 5 * EPS)


def test_group_norm_has_float32_statistics():
    """bfloat16 cannot tell 257 from 256, a mean in it would be of no use."""
    x = jnp.asarray(256 + 8 * _normal(1, 16, 16, 32), jnp.bfloat16)
    have, _ = layers.group_norm(32, jnp.bfloat16).init_with_output(KEY, x)
    assert have.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64).reshape(1, 256, 8, 4)
    axes = {"axis": (1, 3), "keepdims": True}
    want = ((exact - exact.mean(**axes)) / exact.std(**axes)).reshape(x.shape)
    # The result's own rounding; a fast variance, E[x**2] - E[x]**2, loses 10 bits.
    error = np.abs(np.asarray(have, np.float64) - want)
    assert (error <= 2**-8 * np.abs(want) + 2 * 2**10 * EPS * 4).all()


def test_layer_norm():
    x = 3 + 5 * _normal(2, 3, 16)
    scale, bias = _normal(2, 16, seed=1)
    norm = layers.layer_norm(jnp.float32)
    have = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
    exact = x.astype(np.float64)
    variance = exact.var(-1, keepdims=True)
    want = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(have, want * scale + bias, atol=16 * 5 * EPS)


def test_layer_norm_has_float32_statistics():
    """As of GroupNorm."""
    x = jnp.asarray(256 + 8 * _normal(6, 64), jnp.bfloat16)
    have, _ = layers.layer_norm(jnp.bfloat16).init_with_output(KEY, x)
    assert have.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    axes = {"axis": -1, "keepdims": True}
    want = (exact - exact.mean(**axes)) / exact.std(**axes)
    error = np.abs(np.asarray(have, np.float64) - want)
    assert (error <= 2**-8 * np.abs(want) + 2 * 2**10 * EPS * 4).all()


def test_noise_features_are_those_of_a_time_step():
    """Sines and cosines of 1000 t, t that of the cosine schedule."""
    t = np.linspace(0.05, 0.95, 19)
    logsnr = logsnr_schedule(jnp.asarray(t), DiffusionConfig())
    have = layers.noise_features(logsnr, 8)
    angles = 1000 * t[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    want = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    # The schedule squeezes its ends by 2.9e-5 of t, and float32 keeps 1000 t to 1e-4.
    np.testing.assert_allclose(have, want, atol=1000 * 3e-5 + 2e-3)
    assert have.dtype == jnp.float32


def test_space_to_depth():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    folded = np.asarray(layers.space_to_depth(x, 2))
    assert folded.shape == (2, 2, 3, 12)
    # One position's channels are its square of pixels, row by row.
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].ravel())
    np.testing.assert_array_equal(layers.depth_to_space(folded, 2), x)
    np.testing.assert_array_equal(layers.space_to_depth(x, 1), x)


def test_resampling():
    x = _normal(2, 4, 6, 3)
    up = layers.upsample(x)
    np.testing.assert_array_equal(up, np.kron(x, np.ones((1, 2, 2, 1))))
    np.testing.assert_allclose(layers.downsample(up), x, rtol=4 * EPS)
    want = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(layers.downsample(x), want, atol=8 * EPS)
