"""The blocks that both U-Nets are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig
from imagen_jax.models import layers


class ResBlock(nn.Module):
    """Residual block, conditioned by scale and shift (ADM; paper Fig. A.27).

    Attributes:
      features: output channels.
      dtype: compute type.
      dropout: rate before the second convolution; active when a "dropout" key is
        given to `apply`.
      resample: None, "down" or "up": the block also halves or doubles the
        resolution of both of its paths (BigGAN; paper F.1).
      skip_scale: factor on the sum of the two paths.
    """

    features: int
    dtype: jnp.dtype
    dropout: float = 0.0
    resample: str | None = None
    skip_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        """`[B, H, W, C]` and the embedding `[B, E]` to `[B, H', W', features]`."""
        h = nn.silu(layers.group_norm(x.shape[-1], self.dtype, name="norm_1")(x))
        if self.resample:
            change = getattr(layers, self.resample + "sample")
            h, x = change(h), change(x)
        h = layers.conv(self.features, self.dtype, name="conv_1")(h)
        scale_shift = layers.dense(2 * self.features, self.dtype, name="scale_shift")
        scale, shift = jnp.split(scale_shift(nn.silu(emb))[:, None, None], 2, -1)
        h = layers.group_norm(self.features, self.dtype, name="norm_2")(h)
        h = nn.silu(h * (1 + scale) + shift)
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = layers.conv(self.features, self.dtype, zero=True, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = layers.conv(self.features, self.dtype, kernel=1, name="shortcut")(x)
        return (x + h) * self.skip_scale


class AttentionBlock(nn.Module):
    """Attention of pixels over themselves, the text, or both at once.

    Over both, the text's keys and values are concatenated to the pixels' (paper
    D.3.1). The text is layer-normalised first (paper 2.5). A residual block.

    Attributes:
      head_channels: channels per head.
      dtype: compute type.
      over_pixels, over_text: what is attended to; at least one.
      expansion: width of queries, keys and values over that of the pixels.
      skip_scale: factor on the sum with the input.
    """

    head_channels: int
    dtype: jnp.dtype
    over_pixels: bool
    over_text: bool
    expansion: int = 1
    skip_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, cond: Cond) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        b, height, width, channels = x.shape
        num_heads = channels * self.expansion // self.head_channels

        def project(name, values):
            shape = (num_heads, self.head_channels)
            return layers.heads(*shape, self.dtype, name=name)(values)

        pixels = layers.group_norm(channels, self.dtype, name="norm")(x)
        pixels = pixels.reshape(b, height * width, channels)
        keys, values, masks = [], [], []
        if self.over_pixels:
            keys.append(project("key", pixels))
            values.append(project("value", pixels))
            masks.append(jnp.ones(pixels.shape[:2], bool))
        if self.over_text:
            text = layers.layer_norm(self.dtype, name="text_norm")(cond.text)
            keys.append(project("text_key", text))
            values.append(project("text_value", text))
            masks.append(cond.mask)
        out = layers.attend(
            project("query", pixels),
            jnp.concatenate(keys, 1),
            jnp.concatenate(values, 1),
            jnp.concatenate(masks, 1),
        )
        out = layers.dense(channels, self.dtype, zero=True, name="out")(out)
        return (x + out.reshape(x.shape)) * self.skip_scale


class AttentionPool(nn.Module):
    """Attention pooling of the text: one query, made of the tokens' mean.

    Attributes:
      features: width of the result.
      head_channels: channels per head.
      dtype: compute type.
    """

    features: int
    head_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, text: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, L, D]` and `[B, L]` to `[B, features]`; the null text gives a bias."""
        shape = (max(1, self.features // self.head_channels), self.head_channels)
        text = layers.layer_norm(self.dtype, name="norm")(text)
        weights = mask[..., None].astype(text.dtype)
        mean = (text * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
        pooled = layers.attend(
            layers.heads(*shape, self.dtype, name="query")(mean[:, None]),
            layers.heads(*shape, self.dtype, name="key")(text),
            layers.heads(*shape, self.dtype, name="value")(text),
            mask,
        )
        return layers.dense(self.features, self.dtype, name="out")(pooled[:, 0])


class Embedding(nn.Module):
    """Noise level, pooled text and augmentation level in one vector (paper 2.5).

    Attributes:
      features: width of the vector.
      cfg: the network.
    """

    features: int
    cfg: ModelConfig

    @nn.compact
    def __call__(self, logsnr: jax.Array, cond: Cond) -> jax.Array:
        """`[B]` and the conditioning to `[B, features]`."""
        dtype = jnp.dtype(self.cfg.dtype)

        def noise_level(level, name):
            h = layers.noise_features(level, self.cfg.channels[0]).astype(dtype)
            h = layers.dense(self.features, dtype, name=f"{name}_1")(h)
            return layers.dense(self.features, dtype, name=f"{name}_2")(nn.silu(h))

        emb = noise_level(logsnr, "time")
        pool = AttentionPool(self.features, self.cfg.head_channels, dtype, name="pool")
        emb += pool(cond.text, cond.mask)
        if cond.aug_logsnr is not None:
            emb += noise_level(cond.aug_logsnr, "aug")
        return emb


def network_input(z: jax.Array, cond: Cond, cfg: ModelConfig) -> jax.Array:
    """The noised picture, and beside it the low-resolution one, as channels.

    The low-resolution picture is enlarged bicubically (SR3, arXiv 2104.07636).

    Returns:
      `[B, H / p, W / p, p * p * (3 or 6)]` in the compute type, p the patch size.
    """
    if cond.lowres is not None:
        lowres = jax.image.resize(cond.lowres, z.shape, "cubic")
        z = jnp.concatenate([z, lowres], -1)
    return layers.space_to_depth(z.astype(cfg.dtype), cfg.patch_size)


def network_output(x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """`[B, H / p, W / p, p * p * 3]` to `[B, H, W, 3]` float32."""
    return layers.depth_to_space(x.astype(jnp.float32), cfg.patch_size)
