"""The T5 encoder: the frozen network that turns captions into embeddings.

Source: Raffel et al. 2020 (arXiv 1910.10683), sections 2.1 and 3.1.1; version 1.1
has a gated GELU (Shazeer 2020, arXiv 2002.05202) in the feed-forward layer for 1.0's
ReLU. Imagen uses the XXL encoder of version 1.1 (paper section 2.1).
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.sharding import gather_fsdp, split_rows

# Ids in T5's vocabulary.
PAD, END = 0, 1
BUCKETS = 32
MAX_DISTANCE = 128
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder; the defaults are T5 v1.1 XXL (4.6 billion parameters)."""

    vocab_size: int = 32_128  # rows of the embedding table
    num_layers: int = 24  # blocks of attention and feed-forward
    d_model: int = 4096  # width of a token
    d_ff: int = 10_240  # width inside the feed-forward layer
    d_kv: int = 64  # channels of one attention head
    num_heads: int = 64
    # gelu(x W_gate) * (x W_linear) as in version 1.1; else relu(x W_linear) as in 1.0.
    gated: bool = True
    # Of the computation and the result. Parameters are cast to it before use.
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            # Values inside XXL's feed-forward layers pass 65504, float16's largest.
            raise UserError(
                f"T5 does not run in {self.dtype!r}: use {' or '.join(DTYPES)}"
            )


# Layers, d_model, d_ff, d_kv, heads of every published size, by the name that
# `--encoder` takes. Source: T5X's
# examples/t5/t5_1_1/*.gin and t5_1_0/*.gin, which agree with the model cards of
# google/t5-v1_1-* and t5-*.
_SIZES = {
    "t5_1_1_small": (8, 512, 1024, 64, 6),
    "t5_1_1_base": (12, 768, 2048, 64, 12),
    "t5_1_1_large": (24, 1024, 2816, 64, 16),
    "t5_1_1_xl": (24, 2048, 5120, 64, 32),
    "t5_1_1_xxl": (24, 4096, 10_240, 64, 64),
    "t5_1_0_small": (6, 512, 2048, 64, 8),
    "t5_1_0_base": (12, 768, 3072, 64, 12),
    "t5_1_0_large": (24, 1024, 4096, 64, 16),
    "t5_1_0_3b": (24, 1024, 16_384, 128, 32),
    "t5_1_0_11b": (24, 1024, 65_536, 128, 128),
}
SIZES = {
    name: T5Config(32_128, *sizes, gated=name.startswith("t5_1_1"))
    for name, sizes in _SIZES.items()
}


def relative_position_buckets(length: int) -> np.ndarray:
    """`[length, length]` int32: the bucket of every key's distance from every query.

    Half of the buckets are for keys to the right of the query. In each half the first
    half has one bucket for each distance, and the others grow logarithmically up to
    `MAX_DISTANCE`; longer distances share the last one.
    """
    half, exact = BUCKETS // 2, BUCKETS // 4
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # float32 as in the original, whose roundings at bucket borders are trained in.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    growth = ratio / np.float32(math.log(MAX_DISTANCE / exact)) * (half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    bucket = np.where(distance < exact, distance, far)
    return (bucket + half * (offset > 0)).astype(np.int32)


class T5Encoder(nn.Module):
    """Token ids to embeddings.

    The axis "in" of a parameter is the residual stream: it lies over fsdp, while heads
    and feed-forward channels lie over tensor.
    """

    config: T5Config

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """`ids` `[B, L]` int32 to `[B, L, d_model]` of `config.dtype`.

        The mask `[B, L]` is True where a token is real: no token attends to a padded
        one, and the output at padded positions is meaningless.
        """
        cfg = self.config
        # The residual stream is float32: rounded to bfloat16 after each of 24 layers
        # it would lose more than the products do. The table is not gathered: it is
        # cheaper to move the few rows that are looked up.
        shape = (cfg.vocab_size, cfg.d_model)
        table = _param(self, "token_embedding", ("vocab", "in"), shape, 1.0)
        x = split_rows(jnp.take(table, ids, axis=0).astype(jnp.float32))
        shape = (BUCKETS, cfg.num_heads)
        bias_table = _param(
            self, "relative_bias", ("buckets", "heads"), shape, cfg.d_model**-0.5
        )
        buckets = relative_position_buckets(ids.shape[1])
        bias = bias_table[buckets].transpose(2, 0, 1)[None]
        for i in range(cfg.num_layers):
            h = RMSNorm(cfg.dtype, name=f"attention_norm_{i}")(x)
            x = x + SelfAttention(cfg, name=f"attention_{i}")(h, bias, mask)
            h = RMSNorm(cfg.dtype, name=f"feed_forward_norm_{i}")(x)
            x = x + FeedForward(cfg, name=f"feed_forward_{i}")(h)
        return RMSNorm(cfg.dtype, name="final_norm")(x)


@functools.cache
def abstract_params(config: T5Config) -> dict:
    """An encoder's parameters as abstract arrays, boxed with their logical axes."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    init = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, mask)
    return init["params"]


class SelfAttention(nn.Module):
    """Multi-head attention with a position bias; its logits are not scaled."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """`x` [B, L, D], `bias` [1, heads, L, L], `mask` [B, L] -> [B, L, D]."""
        cfg = self.config
        d, heads, width = cfg.d_model, cfg.num_heads, cfg.d_kv

        # 1/sqrt(width) of ordinary attention is in the initial query instead.
        def project(name, stddev):
            axes = ("in", "heads", "head_dim")
            kernel = _kernel(self, name, axes, (d, heads, width), stddev)
            return _product("bld,dhk->blhk", x, kernel)

        y = jax.nn.dot_product_attention(
            project("query", (d * width) ** -0.5),
            project("key", d**-0.5),
            project("value", d**-0.5),
            bias=bias,
            mask=mask[:, None, None, :],
            scale=1.0,
        )
        axes = ("heads", "head_dim", "in")
        out = _kernel(self, "out", axes, (heads, width, d), (heads * width) ** -0.5)
        return split_rows(_product("blhk,hkd->bld", y.astype(cfg.dtype), out))


class FeedForward(nn.Module):
    """Two products with a gated GELU or a ReLU between them, see `T5Config.gated`."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, L, D]` to the same."""
        cfg, axes = self.config, ("in", "out")
        d, hidden = cfg.d_model, cfg.d_ff
        linear = _kernel(self, "linear", axes, (d, hidden), d**-0.5)
        y = _product("bld,df->blf", x, linear)
        if cfg.gated:
            gate = _kernel(self, "gate", axes, (d, hidden), d**-0.5)
            gate = _product("bld,df->blf", x, gate)
            y = nn.gelu(gate, approximate=True) * y
        else:
            y = nn.relu(y)
        out = _kernel(self, "out", ("out", "in"), (hidden, d), hidden**-0.5)
        return split_rows(_product("blf,fd->bld", y.astype(cfg.dtype), out))


def _product(subscripts, x, kernel):
    # The sum is float32 anyway; rounding it to bfloat16 would be an error for nothing.
    return jnp.einsum(subscripts, x, kernel, preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """Divides by the root mean square; no mean, no offset."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to the same; the statistics are float32."""
        scale = _param(self, "scale", ("norm",), (x.shape[-1],), None)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        return (x * scale).astype(self.dtype)


def _param(module, name, axes, shape, stddev):
    init = nn.initializers.normal(stddev) if stddev else nn.initializers.ones
    return module.param(name, nn.with_logical_partitioning(init, axes), shape)


def _kernel(module, name, axes, shape, stddev):
    # Cast before it is gathered, so that half as much is sent.
    kernel = _param(module, name, axes, shape, stddev).astype(module.config.dtype)
    return gather_fsdp(kernel, axes)
