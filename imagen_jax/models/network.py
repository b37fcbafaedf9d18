"""From a stage's config to its network."""

import jax
import jax.numpy as jnp

from imagen_jax.batch import Cond
from imagen_jax.config import ModelConfig, StageConfig
from imagen_jax.models.efficient_unet import EfficientUNet
from imagen_jax.models.unet import UNet

_ARCHITECTURES = {"unet": UNet, "efficient_unet": EfficientUNet}


def apply(
    cfg: ModelConfig,
    params,
    z: jax.Array,
    logsnr: jax.Array,
    cond: Cond,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The network's answer, `[B, H, W, 3]` float32.

    Args:
      cfg: architecture and sizes.
      params: from `init`, unboxed.
      z: `[B, H, W, 3]` float32, the noised picture.
      logsnr: `[B]` float32.
      cond: text and, for a super-resolution stage, the low-res picture.
      dropout_key: given in training; without it dropout is off.
    """
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    model = _ARCHITECTURES[cfg.architecture](cfg)
    return model.apply({"params": params}, z, logsnr, cond, rngs=rngs)


def init(cfg: StageConfig, key: jax.Array):
    """Fresh parameters of the stage's network, boxed with their logical axes."""
    b, size, low = 1, cfg.train_size, cfg.train_lowres_size
    augmented = cfg.diffusion.lowres_augmentation
    cond = Cond(
        text=jnp.zeros((b, cfg.text.length, cfg.text.dim), jnp.bfloat16),
        mask=jnp.ones((b, cfg.text.length), bool),
        lowres=jnp.zeros((b, low, low, 3)) if low else None,
        aug_logsnr=jnp.zeros((b,)) if low and augmented else None,
    )
    z = jnp.zeros((b, size, size, 3))
    model = _ARCHITECTURES[cfg.model.architecture](cfg.model)
    return model.init(key, z, jnp.zeros((b,)), cond)["params"]
