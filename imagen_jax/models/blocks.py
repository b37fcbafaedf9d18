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

    With `resample` it also halves or doubles the resolution of both of its paths
    (BigGAN; paper F.1). Dropout is active when a "dropout" key is given to `apply`.
    """

    features: int  # output channels
    cfg: ModelConfig
    resample: str | None = None  # or "down" or "up"

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        """`[B, H, W, C]` and the embedding `[B, E]` to `[B, H', W', features]`."""
        features, dtype = self.features, jnp.dtype(self.cfg.dtype)
        h = nn.silu(layers.group_norm(x.shape[-1], dtype, name="norm_1")(x))
        if self.resample:
            change = getattr(layers, self.resample + "sample")
            h, x = change(h), change(x)
        h = layers.conv(features, dtype, name="conv_1")(h)
        scale_shift = layers.dense(2 * features, dtype, name="scale_shift")
        scale, shift = jnp.split(scale_shift(nn.silu(emb)), 2, -1)
        h = nn.silu(layers.group_norm(features, dtype, name="norm_2")(h, scale, shift))
        h = nn.Dropout(self.cfg.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = layers.conv(features, dtype, zero=True, name="conv_2")(h)
        if x.shape[-1] != features:
            x = layers.conv(features, dtype, kernel=1, name="shortcut")(x)
        return (x + h) * self.cfg.skip_scale


class AttentionBlock(nn.Module):
    """Attention of pixels to themselves, the text, or both at once, with a skip.

    For both, the text's keys and values are concatenated to the pixels' (paper D.3.1).
    """

    cfg: ModelConfig
    over_pixels: bool  # at least one of the two
    over_text: bool
    expansion: int = 1  # width of queries, keys, values as a multiple of the pixels'

    @nn.compact
    def __call__(self, x: jax.Array, cond: Cond) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        b, height, width, channels = x.shape
        dtype, head = jnp.dtype(self.cfg.dtype), self.cfg.head_channels

        def project(name, values):
            num_heads = channels * self.expansion // head
            return layers.heads(num_heads, head, dtype, name=name)(values)

        pixels = layers.group_norm(channels, dtype, name="norm")(x)
        pixels = pixels.reshape(b, height * width, channels)
        keys, values, masks = [], [], []
        if self.over_pixels:
            keys.append(project("key", pixels))
            values.append(project("value", pixels))
            masks.append(jnp.ones(pixels.shape[:2], bool))
        if self.over_text:
            text = cond.text
            if self.cfg.text_norm:  # paper 2.5
                text = layers.layer_norm(dtype, name="text_norm")(text)
            keys.append(project("text_key", text))
            values.append(project("text_value", text))
            masks.append(cond.mask)
        out = attend(
            project("query", pixels),
            jnp.concatenate(keys, 1),
            jnp.concatenate(values, 1),
            jnp.concatenate(masks, 1),
        )
        out = layers.dense(channels, dtype, zero=True, name="out")(out)
        return (x + out.reshape(x.shape)) * self.cfg.skip_scale


class TextPool(nn.Module):
    """The text pooled into one vector, by attention or as the mean of its tokens.

    Attention has one query, a projection of the mean (paper 2.5 and D.3.1, which do not
    print how attention pools).
    """

    features: int  # width of the result
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
    """Sum of the embeddings of noise level, pooled text, augmentation level (2.5)."""

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
        emb += TextPool(self.features, self.cfg, name="pool")(cond.text, cond.mask)
        if cond.aug_logsnr is not None:
            emb += noise_level(cond.aug_logsnr, "aug")
        return emb


class LevelAttention(nn.Module):
    """The attention blocks of a level, by `text_conditioning`; there may be none."""

    cfg: ModelConfig
    level: int  # the finest is 0
    expansion: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, cond: Cond) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        cfg, kind = self.cfg, self.cfg.text_conditioning
        pixels = cfg.self_attention[self.level]
        text = cfg.text_attention[self.level] and kind in ("concatenate", "cross")
        passes = [(pixels, text)]
        if kind == "cross":
            passes = [(pixels, False), (False, text)]
        for over in filter(any, passes):
            name = "_and_".join(itertools.compress(("pixels", "text"), over))
            block = checkpointed(AttentionBlock, cfg.remat)
            x = block(cfg, *over, expansion=self.expansion, name=name)(x, cond)
        return x


class Block(nn.Module):
    """A residual block with the attention of its level."""

    features: int  # output channels
    cfg: ModelConfig
    level: int | None = None  # whose attention follows; None for none
    resample: str | None = None  # or "down" or "up"

    @nn.compact
    def __call__(
        self, x: jax.Array, skip: jax.Array | None, emb: jax.Array, cond: Cond
    ) -> jax.Array:
        """`[B, H, W, C]`, on the way up with a skip `[B, H, W, C']` from the way down.

        Returns:
          `[B, H', W', features]`.
        """
        if skip is not None:
            x = jnp.concatenate([x, skip], -1)
        residual = checkpointed(ResBlock, self.cfg.remat)
        x = residual(self.features, self.cfg, self.resample, name="residual")(x, emb)
        if self.level is not None:
            x = LevelAttention(self.cfg, self.level, name="attention")(x, cond)
        return x


def checkpointed(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """The module, recomputing in the backward pass as `ModelConfig.remat` says."""
    if remat == "none":
        return module
    # Matrix products and convolutions.
    products = jax.checkpoint_policies.dots_saveable
    return nn.remat(module, policy=products if remat == "activations" else None)


class Chain(nn.Module):
    """A sequence of equal blocks (`Block`)."""

    count: int
    features: int
    cfg: ModelConfig
    level: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, skips: list[jax.Array], emb: jax.Array, cond: Cond
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The output of the last block, and those of all; `skips` may be empty."""
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

    The latter is enlarged bicubically (SR3, arXiv 2104.07636). Patches of p x p are
    folded into channels: `[B, H / p, W / p, p * p * (3 or 6)]`, in the compute type.
    """
    if cond.lowres is not None:
        lowres = jax.image.resize(cond.lowres, z.shape, "cubic")
        z = jnp.concatenate([z, lowres], -1)
    return layers.space_to_depth(z.astype(cfg.dtype), cfg.patch_size)
