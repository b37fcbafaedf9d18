"""Blocks against diffusers' and torch's on the same weights, and new blocks.

The references are recorded in float64 by tests/references/make_torch.py.
"""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig
from imagen_jax.models import blocks, layers

EPS = np.finfo(np.float32).eps
KEY = np.array([0, 1], np.uint32)
FLOAT32 = ModelConfig(dtype="float32")
RECORD = pathlib.Path(__file__).parents[1] / "references" / "torch.npz"


@pytest.fixture(scope="module")
def record():
    return np.load(RECORD)


def _affine(record, name):
    return {"scale": record[f"{name}.weight"], "bias": record[f"{name}.bias"]}


def _dense(record, name):
    """torch's `[out, in]` as flax's `[in, out]`, or 3 x 3 kernels likewise."""
    kernel = record[f"{name}.weight"]
    axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
    return {"kernel": kernel.transpose(axes), "bias": record[f"{name}.bias"]}


def _heads(kernel, bias, heads):
    """torch's `[heads * D, in]` as `[in, heads, D]`."""
    width = kernel.shape[0] // heads
    return {
        "kernel": kernel.T.reshape(-1, heads, width),
        "bias": bias.reshape(heads, width),
    }


def _near(have, want):
    """84 float32 roundings; sums have up to 200 terms and err as their root."""
    assert have.shape == want.shape
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()


def _last(x):
    """Channels first to channels last."""
    return x.transpose(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["same", "wider", "down", "up"])
def test_residual_block(record, name):
    params = {
        "norm_1": _affine(record, f"{name}/norm1"),
        "conv_1": _dense(record, f"{name}/conv1"),
        "scale_shift": _dense(record, f"{name}/time_emb_proj"),
        "norm_2": _affine(record, f"{name}/norm2"),
        "conv_2": _dense(record, f"{name}/conv2"),
    }
    if name == "wider":
        params["shortcut"] = _dense(record, f"{name}/conv_shortcut")
    resample = name if name in ("down", "up") else None
    features = params["conv_2"]["bias"].size
    block = blocks.ResBlock(features, FLOAT32, resample)
    x, emb = _last(record[f"{name}/x"]), record[f"{name}/emb"]
    have = block.apply({"params": params}, x, emb)
    _near(have, _last(record[f"{name}/out"]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expansion"), [("concatenated", 1), ("expanded", 2)])
def test_attention_with_concatenated_text(record, name, expansion):
    def heads(ours):
        weight, bias = (record[f"{name}/{ours}.{part}"] for part in ("weight", "bias"))
        return _heads(weight, bias, 2)

    params = {
        "norm": _affine(record, f"{name}/group_norm"),
        "text_norm": _affine(record, f"{name}/text_norm"),
        "query": heads("to_q"),
        "key": heads("to_k"),
        "value": heads("to_v"),
        "text_key": heads("add_k_proj"),
        "text_value": heads("add_v_proj"),
        "out": _dense(record, f"{name}/to_out.0"),
    }
    cfg = ModelConfig(head_channels=16 * expansion, dtype="float32")
    block = blocks.AttentionBlock(cfg, True, True, expansion)
    cond = Cond(text=record[f"{name}/text"], mask=record[f"{name}/mask"] > 0)
    have = block.apply({"params": params}, _last(record[f"{name}/x"]), cond)
    _near(have, _last(record[f"{name}/out"]))


def test_attention_pooling(record):
    bias = record["pooled/in_proj_bias"].reshape(3, -1)
    query = record["pooled/query.weight"], record["pooled/query.bias"]
    params = {
        "norm": _affine(record, "pooled/norm"),
        "query": _heads(*query, 3),
        "key": _heads(record["pooled/k_proj_weight"], bias[1], 3),
        "value": _heads(record["pooled/v_proj_weight"], bias[2], 3),
        "out": _dense(record, "pooled/out_proj"),
    }
    pool = blocks.TextPool(24, ModelConfig(head_channels=8, dtype="float32"))
    text, mask = record["pooled/text"], record["pooled/mask"] > 0
    _near(pool.apply({"params": params}, text, mask), record["pooled/out"])


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("resample", "scale"), [(None, 0.5), ("up", 1), ("down", 1)])
def test_a_new_residual_block_only_resamples(resample, scale):
    x, emb = _normal(2, 4, 4, 32), _normal(2, 8, seed=1)
    cfg = ModelConfig(skip_scale=scale, dtype="float32")
    block = blocks.ResBlock(32, cfg, resample)
    have, _ = block.init_with_output(KEY, x, emb)
    change = getattr(layers, f"{resample}sample") if resample else lambda x: x
    np.testing.assert_array_equal(have, change(x) * np.float32(scale))


def test_dropout_is_before_the_second_convolution():
    """With everything dropped, only that convolution's bias is added."""
    x, emb = _normal(2, 4, 4, 32), _normal(2, 8, seed=1)
    block = blocks.ResBlock(32, ModelConfig(dropout=1.0, dtype="float32"))
    params = block.init(KEY, x, emb)["params"]
    params["conv_2"] = {"kernel": jnp.ones((3, 3, 32, 32)), "bias": jnp.full(32, 3.0)}
    dropped = block.apply({"params": params}, x, emb, rngs={"dropout": KEY})
    np.testing.assert_array_equal(dropped, x + 3)
    without = block.apply({"params": params}, x, emb)
    assert np.abs(without - (x + 3)).max() > 1


@pytest.mark.slow
def test_a_new_attention_block_only_scales():
    x = _normal(2, 4, 4, 32)
    cond = Cond(text=_normal(2, 3, 8), mask=np.ones((2, 3), bool))
    cfg = ModelConfig(head_channels=16, skip_scale=0.5, dtype="float32")
    block = blocks.AttentionBlock(cfg, True, True, 2)
    have, _ = block.init_with_output(KEY, x, cond)
    np.testing.assert_array_equal(have, x * np.float32(0.5))


def test_recomputing_changes_memory_and_not_gradients():
    """Of a residual block and its level's attention, with drawn parameters."""
    model = {"self_attention": (True,), "text_attention": (False,), "head_channels": 8}
    x, emb = _normal(2, 4, 4, 8), _normal(2, 8, seed=1)
    cond = Cond(text=_normal(2, 3, 8), mask=np.ones((2, 3), bool))

    def block(remat):
        cfg = ModelConfig(**model, dtype="float32", remat=remat)
        return blocks.Block(8, cfg, level=0)

    shapes = jax.eval_shape(block("none").init, KEY, x, None, emb, cond)
    params = jax.tree.map(lambda leaf: _normal(*leaf.shape), nn.unbox(shapes))

    def gradient(remat):
        def loss(params):
            return jnp.sum(jnp.sin(block(remat).apply(params, x, None, emb, cond)))

        program = jax.jit(jax.grad(loss)).lower(params).compile()
        return jax.tree.leaves(program(params)), program.cost_analysis()["flops"]

    kept, flops = gradient("none")
    # Some leaves are zero up to roundings, which are those of the largest.
    bound = 10 * (9 * 8) ** 0.5 * EPS * max(np.abs(leaf).max() for leaf in kept)
    for remat in ("activations", "blocks"):
        recomputed, more = gradient(remat)
        for a, b in zip(kept, recomputed, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=bound)
        assert more > flops, remat


def test_network_input_puts_the_enlarged_picture_beside_the_noised_one():
    z = _normal(2, 8, 8, 3)
    cfg = ModelConfig(dtype="float32", patch_size=2)
    flat = np.full((2, 4, 4, 3), [1, 2, 3], np.float32)  # stays flat when enlarged
    cond = Cond(text=np.zeros((2, 1, 1)), mask=np.zeros((2, 1), bool), lowres=flat)
    folded = blocks.network_input(z, cond, cfg)
    have = np.asarray(layers.depth_to_space(folded, 2))
    np.testing.assert_array_equal(have[..., :3], z)
    want = np.broadcast_to(np.float32([1, 2, 3]), z.shape)
    np.testing.assert_allclose(have[..., 3:], want, rtol=8 * EPS)
    alone = blocks.network_input(z, cond.replace(lowres=None), cfg)
    np.testing.assert_array_equal(layers.depth_to_space(alone, 2), z)
