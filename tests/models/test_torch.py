"""The blocks against diffusers' and torch's, on the same weights.

Recorded by tests/references/make_torch.py, in float64.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from imagen_jax.batch import Cond
from imagen_jax.config import MeshConfig, ModelConfig
from imagen_jax.models import blocks
from imagen_jax.sharding import make_mesh, on_mesh

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
    block = blocks.ResBlock(features, jnp.float32, resample=resample)
    x, emb = _last(record[f"{name}/x"]), record[f"{name}/emb"]
    have = block.apply({"params": params}, x, emb)
    _near(have, _last(record[f"{name}/out"]))


def test_wide_residual_block_on_one_cpu():
    """Its convolutions are others there than in the tests here, and larger."""
    rng = np.random.default_rng(0)
    x, emb = (rng.normal(size=size).astype("f") for size in ((2, 24, 24, 64), (2, 8)))
    block = blocks.ResBlock(64, jnp.float32)
    params = meta.unbox(jax.jit(block.init)(jax.random.key(0), x, emb))
    # None of them at zero.
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), params)
    params = jax.tree.map(np.float32, params)
    on_one = on_mesh(block.apply, make_mesh(MeshConfig(), jax.devices()[:1]))
    program = jax.jit(on_one)
    assert "size=1x3" in program.lower(params, x, emb).as_text("hlo")
    _near(program(params, x, emb), jax.jit(block.apply)(params, x, emb))


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
    width = 16 * expansion
    block = blocks.AttentionBlock(width, jnp.float32, True, True, expansion)
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
