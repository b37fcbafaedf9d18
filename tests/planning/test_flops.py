"""FLOPs of traced functions, against counts by hand and the compiler's own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from imagen_jax.models import network
from imagen_jax.models.attention import cudnn
from imagen_jax.planning.program import count_flops, forward_flops
from tests import tiny


def count(run, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(run)(*arrays).jaxpr)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (2, 2), "padding": "SAME"},
        {"padding": ((3, 0), (0, 3))},
        {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))},
        {"rhs_dilation": (2, 1)},
        {"feature_group_count": 2},
        {"batch_group_count": 2},
    ],
)
def test_a_convolution_without_its_padding(options):
    """As the compiler counts, and, of the plain one, place by place."""
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    run = functools.partial(
        jax.lax.conv_general_dilated,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
    )
    shapes = (2, 7, 6, 4), (3, 3, 4 // options.get("feature_group_count", 1), 8)
    found = count(run, *shapes)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert found == jax.jit(run).lower(*arrays).cost_analysis()["flops"] > 0
    if options == {"window_strides": (1, 1), "padding": "SAME"}:
        places = itertools.product(range(7), range(6), (-1, 0, 1), (-1, 0, 1))
        inside = sum(0 <= y + i < 7 and 0 <= x + j < 6 for y, x, i, j in places)
        assert found == 2 * 2 * inside * 4 * 8


PRODUCT = 2 * 16**3  # of two matrices of 16 x 16


def test_a_loop_counts_as_often_as_it_runs_and_a_condition_once():
    def layer(x, weight):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ weight @ weight, lambda: x), None

    def run(x, weights):
        return jax.lax.scan(lambda x, w: jax.lax.scan(layer, x, w), x, weights)[0]

    assert count(run, (16, 16), (5, 3, 16, 16)) == 5 * 3 * 2 * PRODUCT


def test_gradients_count_what_is_computed_again():
    """Forward once, backward twice; with remat forward twice."""

    def loss(x, a, b):
        return jnp.sin(jnp.tanh(x @ a) @ b).sum()

    shapes = [(16, 16)] * 3
    assert count(jax.grad(loss, (0, 1, 2)), *shapes) == 3 * 2 * PRODUCT
    again = jax.grad(jax.checkpoint(loss), (0, 1, 2))
    assert count(again, *shapes) == 4 * 2 * PRODUCT


def test_functions_with_their_own_gradient_are_counted():
    @jax.custom_vjp
    def run(x, w):
        return x @ w

    run.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g))
    assert count(jax.jit(run), (16, 16), (16, 16)) == PRODUCT
    grad = jax.grad(lambda *args: run(*args).sum(), (0, 1))
    assert count(grad, (16, 16), (16, 16)) == 3 * PRODUCT


def test_what_each_device_does_is_counted_on_all():
    mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("a", "b"))
    specs = {"in_specs": (P(("a", "b")), P()), "out_specs": P(("a", "b"))}
    run = jax.shard_map(lambda x, w: x @ w, mesh=mesh, **specs)
    assert count(run, (64, 16), (16, 16)) == 4 * PRODUCT


def test_kernels_are_counted_by_their_grids():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    run = pl.pallas_call(
        kernel,
        grid=(3,),
        in_specs=[
            pl.BlockSpec((16, 16), lambda i: (i, 0)),
            pl.BlockSpec((16, 16), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((16, 16), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((48, 16), jnp.float32),
    )
    assert count(run, (48, 16), (16, 16)) == 3 * PRODUCT


def test_the_attention_kernel():
    """[T, D] x [D, S] twice forward; logits twice again and five gradients backward."""
    shapes = (2, 3, 256, 64), (2, 3, 128, 64), (2, 3, 128, 64)
    product = 2 * 2 * 3 * 256 * 128 * 64
    assert count(flash_attention, *shapes) == 2 * product
    grad = jax.grad(lambda *args: flash_attention(*args).sum(), (0, 1, 2))
    assert count(grad, *shapes) == (2 + 4 + 3) * product


def test_cudnns_attention(monkeypatch):
    """Which traces to one operation: two products forward, five more backward."""
    fused = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(fused, lambda: 91000)

    def run(q, k, v):
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return cudnn(q, k, v, np.ones((2, 384), bool)).sum()

    shapes = (2, 256, 3, 64), (2, 384, 3, 64), (2, 384, 3, 64)
    product = 2 * 2 * 3 * 256 * 384 * 64
    assert count(run, *shapes) == 2 * product
    assert count(jax.grad(run, (0, 1, 2)), *shapes) == (2 + 5) * product


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny.stage, tiny.sr_stage])
def test_a_network_costs_what_the_compiler_counts(make):
    """Which adds what is done to single elements, more where there are few channels."""
    cfg = make(model={"channels": (32, 64)})
    run = jax.jit(network.apply, static_argnums=0)
    lowered = run.lower(cfg.model, *network.abstract_inputs(cfg))
    ours, theirs = forward_flops(cfg), lowered.cost_analysis()["flops"]
    assert 0.9 < ours / theirs < 1


def test_remat_and_microbatches_do_not_change_the_network():
    cfg = tiny.stage(model=tiny.ONE_LEVEL, training={"microbatches": 2})
    other = tiny.stage(model={**tiny.ONE_LEVEL, "remat": "blocks"})
    assert forward_flops(cfg) == forward_flops(other) > 0
