"""Sums over pixels on one CPU against float64, and each other's transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.config import MeshConfig
from imagen_jax.models import pixels

EPS = np.finfo(np.float32).eps


def _on(devices, run):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    return jax.jit(sharding.on_mesh(run, mesh))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("shape", [(8, 4, 6, 5), (8, 1, 1, 3), (8, 64, 32, 2)])
def test_total_and_its_gradient(devices, shape):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=shape), rng.normal(size=(shape[0], shape[-1]))

    def run(x, weight):
        total, back = jax.vjp(pixels.total, x)
        return total, *back(weight)

    total, gradient = _on(devices, run)(jnp.float32(x), jnp.float32(weight))
    # H sums of W numbers each: rounding grows with H + W.
    bound = EPS * (shape[1] + shape[2]) * np.abs(x).sum((1, 2)).max()
    np.testing.assert_allclose(total, x.sum((1, 2)), rtol=0, atol=bound)
    want = np.broadcast_to(np.float32(weight)[:, None, None], shape)
    np.testing.assert_array_equal(gradient, want)


@pytest.mark.parametrize("devices", [1, 8])
def test_spread_and_its_gradient(devices):
    rng = np.random.default_rng(0)
    values, x = rng.normal(size=(8, 5)), rng.normal(size=(8, 4, 6, 5))

    def run(values, x):
        def weighted(values):
            return (pixels.spread(values, x.shape[1:3]) * x).sum()

        return jax.value_and_grad(weighted)(values)

    value, gradient = _on(devices, run)(jnp.float32(values), jnp.float32(x))
    want = x.sum((1, 2))
    bound = EPS * 10 * np.abs(x).sum((1, 2)).max()
    np.testing.assert_allclose(gradient, want, rtol=0, atol=bound)
    terms = np.abs(values[:, None, None] * x)
    np.testing.assert_allclose(
        value, (values * want).sum(), rtol=0, atol=EPS * 50 * terms.sum()
    )


def test_bfloat16_is_summed_in_float32():
    x = np.zeros((1, 257, 2, 1))
    x[:, :, 0], x[:, :256, 1] = 1 / 256, -1 / 256
    total = _on(1, pixels.total)(jnp.bfloat16(x))
    assert total.dtype == jnp.bfloat16
    # 257 / 256 is no bfloat16: rounded between the sums the rest would be lost.
    np.testing.assert_array_equal(np.float32(total), 1 / 256)
