"""Gradients that are written once on one CPU."""

import jax
import numpy as np

from imagen_jax import sharding
from imagen_jax.compilation import compiler_options
from imagen_jax.config import MeshConfig
from imagen_jax.models import written


def _program(devices):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])

    def run(x):
        value, back = jax.vjp(written.gradient, x)
        return value, *back(3 * x)

    return jax.jit(sharding.on_mesh(run, mesh), compiler_options=compiler_options(mesh))


def test_nothing_else_changes():
    x = np.arange(8.0, dtype="f")
    for devices in (1, 8):
        value, gradient = _program(devices)(x)
        np.testing.assert_array_equal(value, x)
        np.testing.assert_array_equal(gradient, 3 * x)


def test_the_compiler_keeps_the_barrier():
    x = np.arange(8.0, dtype="f")
    assert "opt-barrier" in _program(1).lower(x).compile().as_text()
