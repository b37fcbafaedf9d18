"""The super-resolution network: Efficient U-Net (paper App. B.1, F.2, F.3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig
from imagen_jax.models import blocks, layers


class EfficientUNet(nn.Module):
    """`(z, logsnr, cond) -> output`; no residual block runs at full resolution.

    The resolution is halved before the residual blocks of a level on the way down, and
    doubled after them on the way up.

    Without self-attention the network may be applied to larger images than it was
    trained on: only its group normalisations then take moments over more pixels.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, z: jax.Array, logsnr: jax.Array, cond: Cond) -> jax.Array:
        """See `network.apply`."""
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        cond = blocks.project_text(cond, cfg)
        emb = blocks.Embedding(4 * cfg.channels[0], cfg, name="embedding")(logsnr, cond)

        def chain(x, skips, level, name, count):
            width, name = cfg.channels[level], f"{name}_{level}_chain"
            return blocks.Chain(count, width, cfg, name=name)(x, skips, emb, cond)

        def attention(x, level, name):
            # Twice the channels inside attention (Fig. A.28).
            name = f"{name}_{level}_attention"
            return blocks.LevelAttention(cfg, level, expansion=2, name=name)(x, cond)

        levels = range(len(cfg.channels))
        x = blocks.network_input(z, cond, cfg)
        x = layers.conv(cfg.channels[0], dtype, name="conv_in")(x)
        skips = []
        for level in levels:
            channels = cfg.channels[level]
            x = layers.conv(channels, dtype, stride=2, name=f"down_{level}_conv")(x)
            x, outputs = chain(x, [], level, "down", cfg.num_res_blocks[level])
            x = attention(x, level, "down")
            skips.append(outputs if cfg.skips == "every_block" else [x])

        for level in reversed(levels):
            count = cfg.num_res_blocks[level]
            if cfg.skips == "every_block":
                x, _ = chain(x, skips[level][::-1], level, "up", count)
            else:
                first = blocks.Block(cfg.channels[level], cfg, name=f"up_{level}_first")
                x = first(x, skips[level][0], emb, cond)
                x, _ = chain(x, [], level, "up", count - 1)
            x = attention(x, level, "up")
            channels = cfg.channels[max(0, level - 1)]
            x = layers.upsample(x)
            x = layers.conv(channels, dtype, name=f"up_{level}_conv")(x)

        features = 3 * cfg.patch_size**2
        x = layers.dense(features, dtype, zero=True, name="out")(x)
        return layers.depth_to_space(x.astype(jnp.float32), cfg.patch_size)
