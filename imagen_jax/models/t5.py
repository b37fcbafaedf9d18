"""The T5 v1.1 encoder: the frozen network that turns captions into embeddings.

Source: Raffel et al. 2020 (arXiv 1910.10683), sections 2.1 and 3.1.1; version 1.1
has a gated GELU (Shazeer 2020, arXiv 2002.05202) in the feed-forward layer. Imagen
uses the XXL encoder (paper section 2.1).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

BUCKETS = 32
MAX_DISTANCE = 128


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder; the defaults are T5 v1.1 XXL (4.6 billion parameters).

    Attributes:
      vocab_size: rows of the embedding table.
      num_layers: blocks of attention and feed-forward.
      d_model: width of a token.
      d_ff: width inside the feed-forward layer.
      d_kv: channels of one attention head.
      num_heads: attention heads.
      dtype: of the computation and of the result; parameters are float32.
    """

    vocab_size: int = 32_128
    num_layers: int = 24
    d_model: int = 4096
    d_ff: int = 10_240
    d_kv: int = 64
    num_heads: int = 64
    dtype: str = "bfloat16"


def relative_position_buckets(length: int) -> np.ndarray:
    """The bucket of every key's distance from every query.

    Half of the buckets are for keys to the right of the query. Of each half, the
    first half holds one distance each and the rest grow logarithmically up to
    `MAX_DISTANCE`; all that is further shares the last one.

    Returns:
      `[length, length]` int32 (query, key) in [0, BUCKETS).
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

    The width of the residual stream is named "in" in every parameter: it lies over
    fsdp, while heads and feed-forward channels lie over tensor.
    """

    config: T5Config

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes padded token ids.

        Args:
          ids: `[B, L]` int32 in [0, vocab_size).
          mask: `[B, L]` bool, True where a token is real. No token attends to a
            padded one; what comes out at padded positions means nothing.

        Returns:
          `[B, L, d_model]` of `config.dtype`.
        """
        cfg = self.config
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise ValueError(
                f"ids {ids.shape} and mask {mask.shape} must both be [B, L]"
            )
        table = _param(self, "token_embedding", (cfg.vocab_size, cfg.d_model), 1.0)
        x = jnp.take(table, ids, axis=0).astype(cfg.dtype)
        bias_table = _param(
            self, "relative_bias", (BUCKETS, cfg.num_heads), cfg.d_model**-0.5
        )
        buckets = relative_position_buckets(ids.shape[1])
        bias = bias_table[buckets].transpose(2, 0, 1)[None]
        for i in range(cfg.num_layers):
            h = RMSNorm(cfg.dtype, name=f"attention_norm_{i}")(x)
            x = x + SelfAttention(cfg, name=f"attention_{i}")(h, bias, mask)
            h = RMSNorm(cfg.dtype, name=f"feed_forward_norm_{i}")(x)
            x = x + GatedFeedForward(cfg, name=f"feed_forward_{i}")(h)
        return RMSNorm(cfg.dtype, name="final_norm")(x)


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
            kernel = _param(self, name, (d, heads, width), stddev)
            return jnp.einsum("bld,dhk->blhk", x, kernel.astype(cfg.dtype))

        # The softmax inside is float32 whatever the dtype of its inputs.
        y = jax.nn.dot_product_attention(
            project("query", (d * width) ** -0.5),
            project("key", d**-0.5),
            project("value", d**-0.5),
            bias=bias,
            mask=mask[:, None, None, :],
            scale=1.0,
        )
        out = _param(self, "out", (heads, width, d), (heads * width) ** -0.5)
        return jnp.einsum("blhk,hkd->bld", y, out.astype(cfg.dtype))


class GatedFeedForward(nn.Module):
    """gelu(x W_gate) * (x W_linear), projected back."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, L, D]` to the same."""
        cfg = self.config
        d, hidden = cfg.d_model, cfg.d_ff
        gate = _param(self, "gate", (d, hidden), d**-0.5).astype(cfg.dtype)
        linear = _param(self, "linear", (d, hidden), d**-0.5).astype(cfg.dtype)
        out = _param(self, "out", (hidden, d), hidden**-0.5).astype(cfg.dtype)
        return (nn.gelu(x @ gate, approximate=True) * (x @ linear)) @ out


class RMSNorm(nn.Module):
    """Divides by the root mean square; no mean, no offset."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to the same; the statistics are float32."""
        scale = _param(self, "scale", (x.shape[-1],), None)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        return (x * scale).astype(self.dtype)


_LOGICAL_AXES = {
    "token_embedding": ("vocab", "in"),
    "relative_bias": ("buckets", "heads"),
    "query": ("in", "heads", "head_dim"),
    "key": ("in", "heads", "head_dim"),
    "value": ("in", "heads", "head_dim"),
    "SelfAttention.out": ("heads", "head_dim", "in"),
    "gate": ("in", "out"),
    "linear": ("in", "out"),
    "GatedFeedForward.out": ("out", "in"),
    "scale": ("norm",),
}


def _param(module, name, shape, stddev):
    axes = _LOGICAL_AXES.get(name) or _LOGICAL_AXES[f"{type(module).__name__}.{name}"]
    init = nn.initializers.ones if stddev is None else nn.initializers.normal(stddev)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape)
