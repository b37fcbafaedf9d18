"""From a stage's config to its network."""

import flax.linen as nn
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
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _inputs(cfg))
    model = _ARCHITECTURES[cfg.model.architecture](cfg.model)
    return model.init(key, *inputs)["params"]


def abstract_inputs(cfg: StageConfig):
    """`params, z, logsnr, cond` of one picture, as `apply` takes them; no arrays."""
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    return nn.unbox(params), *_inputs(cfg)


def _inputs(cfg: StageConfig):
    size, low = cfg.train_size, cfg.train_lowres_size
    augmented = low and cfg.diffusion.lowres_augmentation

    def spec(dtype, *shape):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    cond = Cond(
        text=spec(jnp.bfloat16, cfg.text.length, cfg.text.dim),
        mask=spec(jnp.bool_, cfg.text.length),
        lowres=spec(jnp.float32, low, low, 3) if low else None,
        aug_logsnr=spec(jnp.float32) if augmented else None,
    )
    return spec(jnp.float32, size, size, 3), spec(jnp.float32), cond
