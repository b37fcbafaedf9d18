"""Convolution of rows on many devices, against one device and float64."""

import jax
import numpy as np
import pytest
from jax import lax

from imagen_jax import sharding
from imagen_jax.config import MeshConfig
from imagen_jax.models import convolution, winograd

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


@pytest.mark.parametrize(
    ("channels", "features", "height", "stride", "kernel"),
    [
        (5, 4, 8, 1, 3),
        (5, 4, 8, 2, 3),
        (5, 4, 7, 2, 3),
        (5, 4, 7, 3, 5),
        (5, 4, 8, 1, 1),
        (5, 4, 8, 2, 1),
        (5, 4, 8, 1, 2),  # pads unequally
        (5, 4, 1, 1, 3),
        (4, 5, 8, 1, 3),
        (4, 5, 7, 2, 3),
        (4, 5, 8, 1, 2),
    ],
)
def test_on_one_cpu(channels, features, height, stride, kernel):
    shapes = (4, height, 6, channels), (kernel, kernel, channels, features)
    arrays = _arrays(*shapes, stride)
    want = _exact(lambda x, kernel: _plain(x, kernel, stride), arrays)

    def run(x, kernel, weight):
        return _with_gradients(
            lambda x, kernel: convolution.convolve(x, kernel, (stride, stride)),
            *(x, kernel, weight),
        )

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    single = [a.astype(np.float32) for a in arrays]
    program = jax.jit(sharding.on_mesh(run, mesh))
    one_dimension = "dim_labels=b0f_0io->b0f" in program.lower(*single).as_text("hlo")
    assert one_dimension == ((kernel, stride) != (1, 1))
    _check(
        program(*single),
        want,
        (channels * kernel**2, features * kernel**2, 4 * height * 6),
    )


def test_many_pictures_on_one_cpu():
    arrays = _arrays((8, 6, 6, 5), (3, 3, 5, 4))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    run = sharding.on_mesh(lambda *a: _with_gradients(_convolve, *a), mesh)
    program = jax.jit(run)
    single = [a.astype(np.float32) for a in arrays]
    assert "dim_labels=b0f_0io->b0f" not in program.lower(*single).as_text("hlo")
    _check(program(*single), _exact(_plain, arrays), (5 * 9, 4 * 9, 8 * 6 * 6))


@pytest.mark.parametrize(
    ("pictures", "channels", "features", "height", "width", "fours"),
    [
        (4, 32, 40, 16, 20, True),
        (4, 40, 32, 16, 20, True),
        (9, 32, 32, 12, 12, True),
        (4, 32, 32, 18, 20, False),
        (4, 32, 32, 16, 18, False),
        (4, 31, 32, 16, 20, False),
        (4, 32, 32, 12, 20, False),  # few pixels
    ],
)
def test_wide_convolutions_on_one_cpu(
    pictures, channels, features, height, width, fours
):
    shapes = (pictures, height, width, channels), (3, 3, channels, features)
    arrays = _arrays(*shapes)
    want = _exact(_plain, arrays)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    single = [a.astype(np.float32) for a in arrays]
    run = sharding.on_mesh(lambda *a: _with_gradients(_convolve, *a), mesh)
    program = jax.jit(run)
    assert ("size=1x3" in program.lower(*single).as_text("hlo")) == fours
    plain = jax.jit(lambda *a: _with_gradients(_plain, *a))(*single)
    norms = [
        np.linalg.norm(matrix, axis=axis)
        for matrix, axis in (
            (winograd.INPUTS, 1),
            (winograd.KERNELS, 1),
            (winograd.OUTPUTS, 0),
        )
    ]
    inputs, kernels, outputs = norms
    # What each product's rounding is in a result, as of independent numbers, beside
    # those of the three (four) products that a convolution (its kernel's gradient) has.
    of_out = np.linalg.norm(np.array(winograd.OUTPUTS) * inputs * kernels, axis=1)
    of_kernel = np.linalg.norm(np.array(winograd.KERNELS).T * inputs * outputs, axis=1)
    gains = of_out.max() / 3**0.5, of_out.max() / 3**0.5, (of_kernel.max() / 2) ** 2
    for a, b, exact, gain in zip(program(*single), plain, want, gains, strict=True):
        # Twice, for the sums before and behind are rounded, too.
        error, usual = (
            np.linalg.norm(np.asarray(v) - np.asarray(exact)) for v in (a, b)
        )
        assert error <= 2 * gain * usual


def _convolve(x, kernel):
    return convolution.convolve(x, kernel, (1, 1))
