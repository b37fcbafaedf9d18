"""From a stage's config to its network."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

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
      z: `[B, H, W, 3]` float32, the noised image.
      logsnr: `[B]` float32.
      cond: text and, for a super-resolution stage, the low-res image.
      dropout_key: given in training; without it dropout is off.
    """
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    model = _ARCHITECTURES[cfg.architecture](cfg)
    return model.apply({"params": params}, z, logsnr, cond, rngs=rngs)


def layer_maxima(
    cfg: ModelConfig,
    params,
    z: jax.Array,
    logsnr: jax.Array,
    cond: Cond,
    dropout_key: jax.Array | None = None,
) -> list[dict[str, jax.Array]]:
    """The largest absolute value that each layer answers with, NaN if it has one.

    Args:
      cfg, params, z, logsnr, cond, dropout_key: as for `apply`.

    Returns:
      `{"down_0_first/residual/conv_1": maximum}`, float32 scalars, for each layer in
      the order in which they are done: a block comes after its parts.
    """
    paths = []

    def watch(layer, args, kwargs, context):
        answer = layer(*args, **kwargs)
        if context.method_name == "__call__":
            leaves = jax.tree.leaves(answer)
            largest = [jnp.abs(leaf).max().astype(jnp.float32) for leaf in leaves]
            paths.append(context.module.path)
            if largest:
                found = jnp.stack(largest).max()
                context.module.sow("maxima", "max", found, reduce_fn=lambda _, x: x)
        return answer

    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    model = _ARCHITECTURES[cfg.architecture](cfg)
    with nn.intercept_methods(watch):
        _, found = model.apply(
            {"params": params}, z, logsnr, cond, rngs=rngs, mutable=["maxima"]
        )
    flat = flatten_dict(found["maxima"])
    paths = [path for path in dict.fromkeys(paths) if path and (*path, "max") in flat]
    return [{"/".join(path): flat[(*path, "max")]} for path in paths]


def init(cfg: StageConfig, key: jax.Array):
    """Fresh parameters of the stage's network, boxed with their logical axes."""
    return _init(cfg.model, _inputs(cfg), key)


def _init(cfg: ModelConfig, inputs, key):
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    return _ARCHITECTURES[cfg.architecture](cfg).init(key, *inputs)["params"]


def abstract_params(cfg: StageConfig):
    """What `init` returns; no arrays."""
    # Whatever else differs between settings and runs, it is traced once.
    return _abstract_params(dataclasses.replace(cfg.model, remat="none"), _inputs(cfg))


@functools.cache
def _abstract_params(cfg: ModelConfig, inputs):
    return jax.eval_shape(lambda: _init(cfg, inputs, jax.random.key(0)))


def abstract_inputs(cfg: StageConfig):
    """`params, z, logsnr, cond` of one image, as `apply` takes them; no arrays."""
    return nn.unbox(abstract_params(cfg)), *_inputs(cfg)


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
