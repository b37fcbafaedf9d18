"""Winograd's fours: whole numbers, whose sums are exact, and transposes."""

import jax
import numpy as np
import pytest

from imagen_jax.models import winograd

EPS = np.finfo(np.float32).eps


def _whole(*shape, seed=0):
    # Of these a 24th is whole, too.
    return 24.0 * np.random.default_rng(seed).integers(-9, 10, shape).astype("float32")


@pytest.mark.parametrize("axis", [0, 1])
def test_fours_are_the_correlation(axis):
    x, kernel = _whole(12), _whole(3, seed=1)
    padded = np.moveaxis(np.pad(x, 1)[:, None], 0, axis)
    parts = winograd.inputs(padded, axis)
    taps = winograd.kernels(np.moveaxis(kernel[:, None], 0, axis), axis)
    products = tuple(part * tap for part, tap in zip(parts, taps, strict=True))
    found = winograd.outputs(products, axis)
    np.testing.assert_allclose(
        # Thirds and sixths in the kernels are whole up to rounding.
        np.ravel(found),
        np.correlate(np.pad(x, 1), kernel, "valid"),
        rtol=0,
        atol=10 * 24**2 * 81 * EPS,
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_transposes(axis):
    size = [2, 2]
    size[axis] = 8
    fourth = [n // 4 if i == axis else n for i, n in enumerate(size)]
    products = tuple(_whole(*fourth, seed=i) for i in range(6))
    out = _whole(*size, seed=6)
    (want,) = jax.linear_transpose(lambda m: winograd.outputs(m, axis), products)(out)
    pads = [(1, 1) if i == axis else (0, 0) for i in range(2)]
    have = winograd.outputs_back(np.pad(out, pads), axis)
    jax.tree.map(np.testing.assert_array_equal, have, want)

    kernel = _whole(*(3 if i == axis else 2 for i in range(2)))
    taps = winograd.kernels(kernel, axis)
    (want,) = jax.linear_transpose(lambda g: winograd.kernels(g, axis), kernel)(taps)
    # Five roundings of numbers below 400, for a third is none of float32's.
    np.testing.assert_allclose(
        winograd.kernels_back(taps, axis), want, rtol=0, atol=2000 * EPS
    )
