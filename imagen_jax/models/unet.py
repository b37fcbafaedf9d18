"""The base network: the U-Net of ADM with text (paper Sec. 2.5, App. F.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig
from imagen_jax.models import blocks, layers


class UNet(nn.Module):
    """`(z, logsnr, cond) -> output`, all levels convolved at their own resolution.

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

        def res(x, channels, name, resample=None):
            block = blocks.ResBlock(
                channels, dtype, cfg.dropout, resample=resample, name=name
            )
            return block(x, emb)

        def attention(x, level, name):
            over = cfg.self_attention[level], cfg.text_attention[level]
            if not any(over):
                return x
            block = blocks.AttentionBlock(cfg.head_channels, dtype, *over, name=name)
            return block(x, cond)

        levels = range(len(cfg.channels))
        x = blocks.network_input(z, cond, cfg)
        x = layers.conv(cfg.channels[0], dtype, name="conv_in")(x)
        skips = [x]
        for level in levels:
            for i in range(cfg.num_res_blocks[level]):
                x = res(x, cfg.channels[level], f"down_{level}_res_{i}")
                x = attention(x, level, f"down_{level}_attention_{i}")
                skips.append(x)
            if level != levels[-1]:
                x = res(x, cfg.channels[level], f"down_{level}_resample", "down")
                skips.append(x)

        x = res(x, cfg.channels[-1], "middle_res_0")
        x = attention(x, -1, "middle_attention")
        x = res(x, cfg.channels[-1], "middle_res_1")

        for level in reversed(levels):
            for i in range(cfg.num_res_blocks[level] + 1):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = res(x, cfg.channels[level], f"up_{level}_res_{i}")
                x = attention(x, level, f"up_{level}_attention_{i}")
            if level:
                x = res(x, cfg.channels[level], f"up_{level}_resample", "up")

        x = nn.silu(layers.group_norm(x.shape[-1], dtype, name="norm_out")(x))
        features = 3 * cfg.patch_size**2
        x = layers.conv(features, dtype, zero=True, name="conv_out")(x)
        return blocks.network_output(x, cfg)
