"""The encoder against transformers' T5EncoderModel (tests/references/make_t5.py)."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.models import t5

REFERENCE = pathlib.Path(__file__).parents[1] / "references" / "t5.npz"
CONFIG = t5.T5Config(
    vocab_size=50,
    num_layers=2,
    d_model=32,
    d_ff=48,
    d_kv=8,
    num_heads=3,
    dtype="float32",
)


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE, allow_pickle=False) as file:
        return dict(file)


def _params(reference):
    heads = (CONFIG.num_heads, CONFIG.d_kv)
    attention_0 = "encoder.block.0.layer.0.SelfAttention"
    params = {
        "token_embedding": reference["shared.weight"],
        "relative_bias": reference[f"{attention_0}.relative_attention_bias.weight"],
        "final_norm": {"scale": reference["encoder.final_layer_norm.weight"]},
    }
    for i in range(CONFIG.num_layers):
        attention, feed_forward = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        params[f"attention_norm_{i}"] = {
            "scale": reference[f"{attention}.layer_norm.weight"]
        }
        # torch keeps [out, in].
        params[f"attention_{i}"] = {
            ours: reference[f"{attention}.SelfAttention.{theirs}.weight"].T.reshape(
                -1, *heads
            )
            for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))
        } | {
            "out": reference[f"{attention}.SelfAttention.o.weight"].T.reshape(
                *heads, -1
            )
        }
        params[f"feed_forward_norm_{i}"] = {
            "scale": reference[f"{feed_forward}.layer_norm.weight"]
        }
        params[f"feed_forward_{i}"] = {
            ours: reference[f"{feed_forward}.DenseReluDense.{theirs}.weight"].T
            for ours, theirs in (("gate", "wi_0"), ("linear", "wi_1"), ("out", "wo"))
        }
    return params


def _encode(reference, ids, mask, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    variables = {"params": _params(reference)}
    with jax.default_matmul_precision("highest"):
        return jax.jit(t5.T5Encoder(config).apply)(variables, ids, mask)


def test_equals_transformers(reference):
    mask = reference["mask"]
    out = np.asarray(_encode(reference, reference["ids"], mask))[mask]
    want = reference["out"]
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()


def test_parameter_shapes_are_those_of_init(reference):
    ids = jnp.zeros((1, 4), jnp.int32)
    init = jax.eval_shape(t5.T5Encoder(CONFIG).init, jax.random.key(0), ids, ids > -1)
    have = jax.tree.map(np.shape, nn.unbox(init)["params"])
    assert have == jax.tree.map(np.shape, _params(reference))


def test_relative_position_buckets(reference):
    want = reference["buckets"]
    np.testing.assert_array_equal(t5.relative_position_buckets(len(want)), want)


def test_padding_changes_nothing(reference):
    """More padding, or other ids under it, or other rows: the same embeddings."""
    ids, mask = reference["ids"][1:2], reference["mask"][1:2]
    short = _encode(reference, ids[:, :37], mask[:, :37])[0]
    noise = np.where(mask, ids, np.arange(140)[None] % 50).astype(np.int32)
    long = _encode(reference, noise, mask)[0, :37]
    # Float32 sums of at most 140 terms, in another order.
    bound = 140 * np.finfo(np.float32).eps * np.abs(short).max()
    assert np.abs(short - long).max() <= bound


def test_bfloat16_is_near_float32(reference):
    ids, mask = reference["ids"], reference["mask"]
    out = _encode(reference, ids, mask, dtype="bfloat16")
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float32)[mask] - reference["out"]
    # 2**-8 is half a unit of bfloat16; the network has some twenty roundings.
    assert np.abs(error).max() <= 20 * 2**-8 * np.abs(reference["out"]).max()


def test_xxl_has_the_published_size_and_every_axis_a_rule():
    ids = jnp.zeros((1, 4), jnp.int32)
    model = t5.T5Encoder(t5.T5Config())
    init = jax.eval_shape(model.init, jax.random.key(0), ids, ids > -1)
    # The encoder half of T5 v1.1 XXL with its embedding: counted from its shapes.
    layer = 4 * 4096 * 4096 + 3 * 4096 * 10_240 + 2 * 4096
    want = 32_128 * 4096 + 32 * 64 + 24 * layer + 4096
    leaves = jax.tree.leaves(nn.unbox(init))
    assert sum(np.prod(leaf.shape) for leaf in leaves) == want == 4_762_310_656
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shardings = sharding.state_shardings(init["params"], mesh)
    assert len(jax.tree.leaves(shardings)) == len(leaves)


def test_sizes_are_the_published_ones():
    """Millions of parameters, as transformers' T5EncoderModel has them."""
    counted = {}
    for name, size in t5.SIZES.items():
        inner = size.num_heads * size.d_kv
        layer = 4 * size.d_model * inner + 2 * size.d_model
        layer += (3 if size.gated else 2) * size.d_model * size.d_ff
        table = size.vocab_size * size.d_model + 32 * size.num_heads
        total = table + size.num_layers * layer + size.d_model
        counted[name] = round(total / 1e6, 1)
    assert counted == {
        "t5_1_1_small": 35.3,
        "t5_1_1_base": 109.6,
        "t5_1_1_large": 341.2,
        "t5_1_1_xl": 1223.5,
        "t5_1_1_xxl": 4762.3,
        "t5_1_0_small": 35.3,
        "t5_1_0_base": 109.6,
        "t5_1_0_large": 334.9,
        "t5_1_0_3b": 1240.9,
        "t5_1_0_11b": 4864.8,
    }


def test_other_types_are_refused():
    with pytest.raises(
        UserError, match="not run in 'float16': use bfloat16 or float32"
    ):
        t5.T5Config(dtype="float16")


@pytest.mark.slow
def test_init_keeps_the_logits_near_one():
    """Neither uniform nor saturated attention, so a random encoder is of use."""
    ids = jnp.arange(32)[None]
    config = t5.T5Config(200, 1, 256, 256, 32, 8, dtype="float32")
    variables = t5.T5Encoder(config).init(jax.random.key(0), ids, ids > -1)
    params = jax.tree.map(np.asarray, nn.unbox(variables)["params"])
    x, attention = params["token_embedding"], params["attention_0"]
    query, key = (
        np.tensordot(x, attention[name], 1).swapaxes(0, 1) for name in ("query", "key")
    )
    assert 0.9 < (query @ key.swapaxes(1, 2)).std() < 1.1
