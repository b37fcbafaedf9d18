"""Blocks of both U-Nets: residual, attention, embeddings."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig
from imagen_jax.models import layers
from imagen_jax.models.attention import attend


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
        scale, shift = jnp.split(scale_shift(nn.silu(emb)), 2, -1)
        norm = layers.group_norm(self.features, self.dtype, name="norm_2")
        h = nn.silu(norm(h, scale, shift))
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = layers.conv(self.features, self.dtype, zero=True, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = layers.conv(self.features, self.dtype, kernel=1, name="shortcut")(x)
        return (x + h) * self.skip_scale


class AttentionBlock(nn.Module):
    """Attention of pixels to themselves, the text, or both at once, with a skip.

    For both, the text's keys and values are concatenated to the pixels' (paper D.3.1).

    Attributes:
      head_channels: channels per head.
      dtype: compute type.
      over_pixels, over_text: what is attended to; at least one.
      expansion: width of queries, keys and values as a multiple of the pixels'.
      skip_scale: factor on the sum with the input.
      text_norm: whether the text is layer-normalised first (paper 2.5).
    """

    head_channels: int
    dtype: jnp.dtype
    over_pixels: bool
    over_text: bool
    expansion: int = 1
    skip_scale: float = 1.0
    text_norm: bool = True

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
            text = cond.text
            if self.text_norm:
                text = layers.layer_norm(self.dtype, name="text_norm")(text)
            keys.append(project("text_key", text))
            values.append(project("text_value", text))
            masks.append(cond.mask)
        out = attend(
            project("query", pixels),
            jnp.concatenate(keys, 1),
            jnp.concatenate(values, 1),
            jnp.concatenate(masks, 1),
        )
        out = layers.dense(channels, self.dtype, zero=True, name="out")(out)
        return (x + out.reshape(x.shape)) * self.skip_scale


class TextPool(nn.Module):
    """The text pooled into one vector, by attention or as the mean of its tokens.

    Attention has one query, a projection of the mean (paper 2.5 and D.3.1, which do not
    print how attention pools).

    Attributes:
      features: width of the result.
      cfg: the network.
    """

    features: int
    cfg: ModelConfig

    @nn.compact
    def __call__(self, text: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, L, D]` and `[B, L]` to `[B, features]`; the bias for the null text."""
        dtype = jnp.dtype(self.cfg.dtype)
        if self.cfg.text_norm:
            text = layers.layer_norm(dtype, name="norm")(text)
        weights = mask[..., None].astype(jnp.float32)
        mean = (text * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
        pooled = mean
        if self.cfg.text_conditioning != "mean_pool":
            width = self.cfg.head_channels
            shape = (max(1, self.features // width), width)
            pooled = attend(
                layers.heads(*shape, dtype, name="query")(mean[:, None]),
                layers.heads(*shape, dtype, name="key")(text),
                layers.heads(*shape, dtype, name="value")(text),
                mask,
            )[:, 0]
        return layers.dense(self.features, dtype, name="out")(pooled)


class Embedding(nn.Module):
    """Sum of the embeddings of noise level, pooled text and augmentation level (2.5).

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
        pool = TextPool(self.features, self.cfg, name="pool")
        emb += pool(cond.text, cond.mask)
        if cond.aug_logsnr is not None:
            emb += noise_level(cond.aug_logsnr, "aug")
        return emb


class LevelAttention(nn.Module):
    """The attention blocks of a level, by `text_conditioning`; there may be none.

    Attributes:
      cfg: the network.
      level: index of the level, the finest being 0.
      expansion: see `AttentionBlock`.
    """

    cfg: ModelConfig
    level: int
    expansion: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, cond: Cond) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        cfg = self.cfg
        over_pixels = cfg.self_attention[self.level]
        over_text = cfg.text_attention[self.level] and cfg.text_conditioning in (
            "concatenate",
            "cross",
        )
        kinds = [(over_pixels, over_text)]
        if cfg.text_conditioning == "cross":
            kinds = [(over_pixels, False), (False, over_text)]
        for over in filter(any, kinds):
            names = itertools.compress(("pixels", "text"), over)
            block = checkpointed(AttentionBlock, cfg.remat)(
                cfg.head_channels,
                jnp.dtype(cfg.dtype),
                *over,
                expansion=self.expansion,
                skip_scale=cfg.skip_scale,
                text_norm=cfg.text_norm,
                name="_and_".join(names),
            )
            x = block(x, cond)
        return x


class Block(nn.Module):
    """A residual block with the attention of its level.

    Attributes:
      features: output channels.
      cfg: the network.
      level: level whose attention follows; None for none.
      resample: None, "down" or "up".
    """

    features: int
    cfg: ModelConfig
    level: int | None = None
    resample: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, skip: jax.Array | None, emb: jax.Array, cond: Cond
    ) -> jax.Array:
        """`[B, H, W, C]` to `[B, H', W', features]`.

        Args:
          x: output of the block before.
          skip: `[B, H, W, C']` from the way down, concatenated to it; None on the way
            down.
          emb: `[B, E]`, the embedding.
          cond: text.
        """
        if skip is not None:
            x = jnp.concatenate([x, skip], -1)
        residual = checkpointed(ResBlock, self.cfg.remat)(
            self.features,
            jnp.dtype(self.cfg.dtype),
            self.cfg.dropout,
            resample=self.resample,
            skip_scale=self.cfg.skip_scale,
            name="residual",
        )
        x = residual(x, emb)
        if self.level is not None:
            x = LevelAttention(self.cfg, self.level, name="attention")(x, cond)
        return x


def checkpointed(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """The module, recomputing in the backward pass as `ModelConfig.remat` says."""
    if remat == "none":
        return module

    def is_product(primitive, *_, **__):
        return primitive.name in ("conv_general_dilated", "dot_general")

    policy = is_product if remat == "activations" else None
    return nn.remat(module, policy=policy)


class Chain(nn.Module):
    """A sequence of equal blocks.

    Attributes:
      count: number of blocks.
      features, cfg, level: see `Block`.
    """

    count: int
    features: int
    cfg: ModelConfig
    level: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, skips: list[jax.Array], emb: jax.Array, cond: Cond
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The output of the last block, and the list of all outputs.

        Args:
          x: `[B, H, W, C]`.
          skips: a `[B, H, W, C']` for each block, or none for all.
          emb: `[B, E]`, the embedding.
          cond: text.
        """
        outputs = []
        for i in range(self.count):
            block = Block(self.features, self.cfg, self.level, name=f"block_{i}")
            x = block(x, skips[i] if skips else None, emb, cond)
            outputs.append(x)
        return x, outputs


def project_text(cond: Cond, cfg: ModelConfig) -> Cond:
    """The text projected to `cfg.text_features`; to be called in a compact module."""
    if not cfg.text_features:
        return cond
    project = layers.dense(cfg.text_features, jnp.dtype(cfg.dtype), name="text")
    return cond.replace(text=project(cond.text))


def network_input(z: jax.Array, cond: Cond, cfg: ModelConfig) -> jax.Array:
    """Channels of the noised image and, after them, of the low-resolution image.

    The latter is enlarged bicubically (SR3, arXiv 2104.07636).

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
