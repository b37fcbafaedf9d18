"""The product and its gradients against float64, and that nothing is transposed."""

import jax
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.compilation import compiler_options
from imagen_jax.config import MeshConfig
from imagen_jax.models import product

EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("kernel", [(7, 5), (7, 3, 2)])
@pytest.mark.parametrize("rows", [(), (4,), (2, 3, 4)])
def test_product_and_its_gradients(rows, kernel):
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(*rows, 7)), rng.normal(size=kernel)
    out = rng.normal(size=(*rows, *kernel[1:]))
    count = int(np.prod(rows))
    flat_out = out.reshape(count, -1)
    want = (
        np.tensordot(x, k, 1),
        (flat_out @ k.reshape(7, -1).T).reshape(x.shape),
        (x.reshape(count, 7).T @ flat_out).reshape(k.shape),
    )
    single = [a.astype(np.float32) for a in (x, k, out)]
    found, back = jax.vjp(product.product, *single[:2])
    for a, b, terms in zip((found, *back(single[2])), want, (7, 6, count), strict=True):
        # So many products of normal numbers, of which none is as large as 4 x 4.
        np.testing.assert_allclose(a, b, rtol=0, atol=16 * (terms + 2) * EPS * terms)


def test_gradients_need_no_transposed_copies():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    x, k, out = np.ones((64, 32), "f"), np.ones((32, 16), "f"), np.ones((64, 16), "f")

    def run(x, k, out):
        dot = (((1,), (0,)), ((), ()))
        return jax.vjp(lambda x, k: product.dot_general(x, k, dot), x, k)[1](2 * out)

    program = jax.jit(
        sharding.on_mesh(run, mesh), compiler_options=compiler_options(mesh)
    )
    text = program.lower(x, k, out).compile().as_text()
    assert "} dot(" in text
    assert "} transpose(" not in text
    assert "} copy(" not in text
