"""Attention, XLA's and the kernels', against a closed form in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from imagen_jax.config import MeshConfig
from imagen_jax.models import attention
from imagen_jax.models.attention import attend, by_kernel, cudnn, flash
from imagen_jax.sharding import AXES, batch_sharding, make_mesh, on_mesh

EPS = np.finfo(np.float32).eps


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _attend_exactly(q, k, v, mask):
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    logits = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * mask[:, None, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bnts,bsnd->btnd", weights, v).reshape(*q.shape[:2], -1)


def test_attend_is_a_masked_softmax():
    q, k, v = _normal(3, 6, 2, 8), _normal(3, 5, 2, 8), _normal(3, 5, 2, 8, seed=1)
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], bool)
    have = attend(q, k, v, mask)
    want = _attend_exactly(q, k, v, mask)
    assert have.shape == (3, 6, 16)
    # Logits of a few units, sums of 8 and 5 terms.
    np.testing.assert_allclose(have, want, atol=13 * 8 * EPS)


def test_logits_and_softmax_are_float32():
    """bfloat16 cannot tell the logits 256 and 257, and would take the mean."""
    q = jnp.array([32, 2, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k = jnp.array([[16, 0, 0, 0], [16, 1, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([[0] * 4, [1] * 4], jnp.bfloat16).reshape(1, 2, 1, 4)
    have = attend(q, k, v, np.ones((1, 2), bool))
    assert have.dtype == jnp.bfloat16
    # The weight and the answer are rounded to bfloat16.
    want = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(have.astype(np.float32), want, rtol=2 * 2**-9)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [False, True])
def test_attending_to_nothing_is_zero(kernel, monkeypatch):
    """As the null text is, where a level attends to the text alone."""
    t, s = (128, 128) if kernel else (6, 5)
    monkeypatch.setattr(attention, "_kernel", lambda *_: flash if kernel else None)
    q, k, v = _normal(2, t, 2, 8), _normal(2, s, 2, 8), 1e30 * _normal(2, s, 2, 8)
    mask = np.array([[0] * s, [1] * s], bool)

    def total(q, k, v):
        return attend(q, k, v, mask)[0].sum()

    with pltpu.force_tpu_interpret_mode():
        have = np.asarray(attend(q, k, v, mask))
        gradients = jax.grad(total, (0, 1, 2))(q, k, v)
    assert (have[0] == 0).all() and (have[1] != 0).all()
    for gradient in gradients:
        assert (gradient == 0).all()


def _inputs(rows, pixels, keys):
    q, k = _normal(rows, pixels, 2, 64), _normal(rows, keys, 2, 64, seed=1)
    mask = np.arange(keys) < np.array([keys, keys - 77] * (rows // 2))[:, None]
    return q, k, _normal(rows, keys, 2, 64, seed=2), mask


def _gradients(way, q, k, v, mask):
    def loss(q, k, v):
        return (way(q, k, v, mask) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.slow
def test_the_tpu_kernel_is_a_masked_softmax():
    """Interpreted on the CPU, with the base's 16 x 16 pixels and text."""
    pixels, keys = 256, 384
    q, k, v, mask = _inputs(2, pixels, keys)
    with pltpu.force_tpu_interpret_mode():
        have = flash(q, k, v, mask)
        gradients = _gradients(flash, q, k, v, mask)
    want = _attend_exactly(q, k, v, mask)
    # Logits of a few units are sums of 64 products, the answer one of `keys` terms of
    # weight 1 / keys, both in the worst order.
    bound = (64 + keys) * EPS
    np.testing.assert_allclose(have.reshape(want.shape), want, atol=bound)
    for one, exact in zip(gradients, _gradients(attend, q, k, v, mask), strict=True):
        np.testing.assert_allclose(one, exact, atol=4 * bound * np.abs(exact).max())


def test_the_tpu_kernel_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    q, k, v, mask = jax.device_put(_inputs(4, 128, 256), batch_sharding(mesh))
    with pltpu.force_tpu_interpret_mode():
        run = functools.partial(by_kernel, flash)
        have = jax.jit(on_mesh(run, mesh))(q, k, v, mask)
        one = flash(*_inputs(4, 128, 256))
    np.testing.assert_allclose(have, one, atol=16 * EPS)


@pytest.mark.parametrize(
    ("pixels", "keys", "width"),
    [(1024, 1152, 64), (256, 384, 64), (256, 384, 256), (256, 128, 256)]
    + [(4096, 128, 256)],
)
def test_the_tpu_kernel_takes_the_papers_lengths(pixels, keys, width):
    """The base at 32 and 16 pixels, sr256, sr1024's crops and whole pictures."""
    q = jax.ShapeDtypeStruct((1, pixels, 1, width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, keys, 1, width), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, keys), jnp.bool_)
    made = jax.eval_shape(functools.partial(_gradients, flash), q, k, k, mask)
    assert [one.shape for one in made] == [q.shape, k.shape, k.shape]


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """XLA's attention of key lengths in place of cuDNN's, which takes a GPU."""
    own = jax.nn.dot_product_attention

    def run(*args, implementation, **options):
        assert implementation == "cudnn"
        return own(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", run)


def test_key_lengths_say_what_a_mask_says(cudnn_by_xla):
    """Text is padded at its end; without any there is one key, whose answer is left."""
    q, k, v, mask = _inputs(4, 16, 96)
    mask[3] = False
    have = cudnn(q, k, v, mask)
    want = _attend_exactly(q, k, v, mask)
    bound = (64 + 96) * EPS
    np.testing.assert_allclose(have.reshape(want.shape)[:3], want[:3], atol=bound)
    np.testing.assert_allclose(have[3], np.tile(v[3, :1], (16, 1, 1)), atol=EPS)


def test_key_lengths_on_a_mesh(cudnn_by_xla):
    mesh = make_mesh(MeshConfig(data=2, spatial=2, tensor=2))
    args = jax.device_put(_inputs(4, 256, 96), batch_sharding(mesh))
    have = jax.jit(on_mesh(functools.partial(by_kernel, cudnn), mesh))(*args)
    np.testing.assert_allclose(have, cudnn(*_inputs(4, 256, 96)), atol=16 * EPS)


@pytest.mark.parametrize(
    ("platform", "rows", "pixels", "keys", "width", "dtype", "kernel"),
    [
        ("tpu", 4, 256, 384, 64, "bfloat16", flash),
        ("tpu", 4, 256, 384, 64, "float32", flash),
        ("tpu", 4, 256, 384, 256, "bfloat16", flash),
        ("tpu", 4, 256, 384, 192, "bfloat16", None),
        ("tpu", 3, 256, 384, 64, "bfloat16", None),
        ("tpu", 4, 64, 192, 64, "bfloat16", None),
        ("tpu", 4, 256, 300, 64, "bfloat16", None),
        ("gpu", 4, 256, 384, 64, "bfloat16", cudnn),
        ("gpu", 4, 64, 77, 128, "bfloat16", cudnn),
        ("gpu", 4, 256, 384, 64, "float32", None),
        ("gpu", 4, 256, 384, 256, "bfloat16", None),
        ("gpu", 4, 256, 384, 20, "bfloat16", None),
        ("gpu", 3, 256, 384, 64, "bfloat16", None),
        ("gpu", 4, 1, 128, 64, "bfloat16", None),
        ("cpu", 4, 256, 384, 64, "bfloat16", None),
    ],
)
def test_a_kernel_is_taken_where_it_fits(
    platform, rows, pixels, keys, width, dtype, kernel
):
    device = jax.sharding.AbstractDevice(platform, 1, platform)
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 1), AXES, abstract_device=device)
    q = jax.ShapeDtypeStruct((rows, pixels, 2, width), dtype)
    k = jax.ShapeDtypeStruct((rows, keys, 2, width), dtype)
    mask = jax.ShapeDtypeStruct((rows, keys), jnp.bool_)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention._kernel(q, k) is kernel
        if kernel is not cudnn:
            program = str(jax.make_jaxpr(attend)(q, k, k, mask))
            assert ("pallas_call" in program) == (kernel is flash)
