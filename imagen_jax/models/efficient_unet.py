"""The super-resolution network: Efficient U-Net (paper App. B.1, F.2, F.3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig
from imagen_jax.models import blocks, layers


class EfficientUNet(nn.Module):
    """`(z, logsnr, cond) -> output`, resolution changed on the cheap side.

    A level is halved before its residual blocks on the way down and doubled after
    them on the way up, so no residual block runs at the picture's own resolution.
    Sums are scaled by 1 / sqrt(2) (B.1). Each residual block on the way down has its
    own skip: only so the printed blocks come to the stated 600M parameters.

    Attributes:
      cfg: widths, depths, attention and compute type.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, z: jax.Array, logsnr: jax.Array, cond: Cond) -> jax.Array:
        """Predicts `[B, H, W, 3]` float32 from the noised picture of that shape.

        Args:
          z: `[B, H, W, 3]` float32.
          logsnr: `[B]` float32.
          cond: text `[B, L, D]`, and the low-res picture of a super-resolution stage.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        emb = blocks.Embedding(4 * cfg.channels[0], cfg, name="embedding")(logsnr, cond)

        def res(x, channels, name):
            block = blocks.ResBlock(
                channels, dtype, cfg.dropout, skip_scale=0.5**0.5, name=name
            )
            return block(x, emb)

        def attention(x, level, name):
            over = cfg.self_attention[level], cfg.text_attention[level]
            if not any(over):
                return x
            # Twice the channels inside attention: Fig. A.28.
            block = blocks.AttentionBlock(
                cfg.head_channels,
                dtype,
                *over,
                expansion=2,
                skip_scale=0.5**0.5,
                name=name,
            )
            return block(x, cond)

        levels = range(len(cfg.channels))
        x = blocks.network_input(z, cond, cfg)
        x = layers.conv(cfg.channels[0], dtype, name="conv_in")(x)
        skips = []
        for level in levels:
            channels = cfg.channels[level]
            x = layers.conv(channels, dtype, stride=2, name=f"down_{level}_conv")(x)
            for i in range(cfg.num_res_blocks[level]):
                x = res(x, channels, f"down_{level}_res_{i}")
                skips.append(x)
            x = attention(x, level, f"down_{level}_attention")

        for level in reversed(levels):
            for i in range(cfg.num_res_blocks[level]):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = res(x, cfg.channels[level], f"up_{level}_res_{i}")
            x = attention(x, level, f"up_{level}_attention")
            channels = cfg.channels[max(0, level - 1)]
            x = layers.upsample(x)
            x = layers.conv(channels, dtype, name=f"up_{level}_conv")(x)

        features = 3 * cfg.patch_size**2
        x = layers.dense(features, dtype, zero=True, name="out")(x)
        return blocks.network_output(x, cfg)
