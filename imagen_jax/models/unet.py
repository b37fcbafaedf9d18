"""The base network: the U-Net of ADM with text (paper Sec. 2.5, App. F.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig
from imagen_jax.models import blocks, layers


class UNet(nn.Module):
    """`(z, logsnr, cond) -> output`; levels are convolved at their own resolution."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, z: jax.Array, logsnr: jax.Array, cond: Cond) -> jax.Array:
        """See `network.apply`."""
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        cond = blocks.project_text(cond, cfg)
        emb = blocks.Embedding(4 * cfg.channels[0], cfg, name="embedding")(logsnr, cond)

        def block(x, skip, features, name, **kwargs):
            run = blocks.Block(features, cfg, name=name, **kwargs)
            return run(x, skip, emb, cond)

        levels = range(len(cfg.channels))
        x = blocks.network_input(z, cond, cfg)
        x = layers.conv(cfg.channels[0], dtype, name="conv_in")(x)
        skips = [x]
        for level, features in enumerate(cfg.channels):
            more = cfg.num_res_blocks[level] - 1
            # The first block's input has another width; the others are equal.
            x = block(x, None, features, f"down_{level}_first", level=level)
            chain = blocks.Chain(more, features, cfg, level, name=f"down_{level}_chain")
            skips.append(x)
            x, outputs = chain(x, [], emb, cond)
            skips += outputs
            if level != levels[-1]:
                name = f"down_{level}_resample"
                x = block(x, None, features, name, resample="down")
                skips.append(x)

        x = block(x, None, cfg.channels[-1], "middle_0", level=-1)
        x = block(x, None, cfg.channels[-1], "middle_1")

        for level in reversed(levels):
            features = cfg.channels[level]
            more = cfg.num_res_blocks[level] - 1
            x = block(x, skips.pop(), features, f"up_{level}_first", level=level)
            chain = blocks.Chain(more, features, cfg, level, name=f"up_{level}_chain")
            x, _ = chain(x, [skips.pop() for _ in range(more)], emb, cond)
            x = block(x, skips.pop(), features, f"up_{level}_last", level=level)
            if level:
                x = block(x, None, features, f"up_{level}_resample", resample="up")

        x = nn.silu(layers.group_norm(x.shape[-1], dtype, name="norm_out")(x))
        features = 3 * cfg.patch_size**2
        x = layers.conv(features, dtype, zero=True, name="conv_out")(x)
        return layers.depth_to_space(x.astype(jnp.float32), cfg.patch_size)
