"""Convolution of rows on many devices, against one device in float64."""

import jax
import numpy as np
import pytest
from jax import lax

from imagen_jax import sharding
from imagen_jax.config import MeshConfig
from imagen_jax.models import convolution

EPS = np.finfo(np.float32).eps


def _plain(x, kernel, stride=1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _arrays(x, kernel, stride=1, seed=0):
    rng = np.random.default_rng(seed)
    out = (x[0], -(-x[1] // stride), -(-x[2] // stride), kernel[3])
    return [rng.normal(size=shape) for shape in (x, kernel, out)]


def _with_gradients(run, x, kernel, weight):
    """The answer, and the gradients of its sum with `weight`."""
    out, pull = jax.vjp(run, x, kernel)
    return out, *pull(weight)


def _exact(run, arrays):
    with jax.enable_x64(True):
        return jax.jit(lambda *a: _with_gradients(run, *a))(*arrays)


def _check(have, want, products):
    for a, b, terms in zip(have, want, products, strict=True):
        # Each is a sum of products of normal numbers, whose roundings add up.
        np.testing.assert_allclose(a, b, rtol=0, atol=terms * EPS * np.sqrt(terms))


@pytest.mark.parametrize(
    ("axes", "height", "stride", "kernel"),
    [
        ({"spatial": 8}, 16, 1, 3),
        ({"spatial": 8}, 8, 1, 3),  # one row each
        ({"spatial": 4, "tensor": 2}, 16, 2, 3),
        ({"spatial": 2, "fsdp": 2, "tensor": 2}, 12, 1, 3),
        ({"spatial": 4, "data": 2}, 8, 1, 1),
        ({"spatial": 8}, 8, 2, 3),  # a row is not two: whole pictures
        ({"spatial": 4, "data": 2}, 6, 1, 3),  # does not divide
        ({"spatial": 8}, 8, 1, 5),  # needs more than a neighbour's rows
    ],
)
def test_rows_on_many_devices(axes, height, stride, kernel):
    mesh = sharding.make_mesh(MeshConfig(**axes))
    shapes = (4, height, 6, 5), (kernel, kernel, 5, 4)
    arrays = _arrays(*shapes, stride)
    want = _exact(lambda x, kernel: _plain(x, kernel, stride), arrays)

    def run(x, kernel, weight):
        def convolve(x, kernel):
            names = ("kernel_h", "kernel_w", "in", "out")
            kernel = sharding.gather_fsdp(kernel, names)
            x = sharding.split_rows(x)
            return convolution.convolve(x, kernel, (stride, stride))

        return _with_gradients(convolve, x, kernel, weight)

    single = [a.astype(np.float32) for a in arrays]
    single = jax.device_put(single, sharding.replicated(mesh))
    have = jax.jit(sharding.on_mesh(run, mesh))(*single)
    _check(have, want, (5 * kernel**2, 4 * kernel**2, 4 * height * 6))
    if height % (mesh.shape["spatial"] * stride) == 0 and kernel < 5:
        assert have[0].sharding.spec[1] == "spatial"


# Padded unequally, and of an odd height.
@pytest.mark.parametrize(("height", "stride", "kernel"), [(8, 1, 2), (7, 2, 3)])
def test_on_one_device(height, stride, kernel):
    x, weights, _ = _arrays((2, height, 6, 5), (kernel, kernel, 5, 4), stride)
    want = _plain(np.float32(x), np.float32(weights), stride)
    have = convolution.convolve(np.float32(x), np.float32(weights), (stride, stride))
    np.testing.assert_array_equal(have, want)
