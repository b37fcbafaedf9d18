"""A stage's network: its parameters, its inputs and its output."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from imagen_jax.batch import Cond, text_shape
from imagen_jax.config import ModelConfig, StageConfig
from imagen_jax.errors import UserError
from imagen_jax.models.efficient_unet import EfficientUNet
from imagen_jax.models.unet import UNet

# By `ModelConfig.architecture`, each called with the `ModelConfig`; one of your own is
# "own:NAME" (docs/extending.md).
ARCHITECTURES = {"unet": UNet, "efficient_unet": EfficientUNet}


def module(cfg: ModelConfig) -> nn.Module:
    """The network: `(z, logsnr, cond) -> output`, called as `apply` is."""
    if cfg.architecture not in ARCHITECTURES:
        raise UserError(
            f"the network {cfg.architecture!r} is not in models.network.ARCHITECTURES: "
            "run the code that puts it there first (docs/extending.md)"
        )
    return ARCHITECTURES[cfg.architecture](cfg)


def apply(
    cfg: ModelConfig,
    params,
    z: jax.Array,
    logsnr: jax.Array,
    cond: Cond,
    dropout_key: jax.Array | None = None,
    **options,
) -> jax.Array:
    """The network's output for noised images `z`, `[B, H, W, 3]` float32 like them.

    `params` are as from `init`, unboxed; `logsnr` `[B]` float32 is the noise level.
    `dropout_key` is given in training: without it there is no dropout. `options` are
    those of flax's `Module.apply`.
    """
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    return module(cfg).apply({"params": params}, z, logsnr, cond, rngs=rngs, **options)


def layer_maxima(cfg: ModelConfig, *args) -> list[dict[str, jax.Array]]:
    """The largest absolute value that each layer returns; NaN if it returns one.

    Called like `apply`, it returns `{"down_0_first/residual/conv_1": maximum}`, float32
    scalars, for each layer in the order of the forward pass: a block after its parts.
    """
    # With remat flax would sort the layers by their names.
    cfg = dataclasses.replace(cfg, remat="none")
    _, found = apply(cfg, *args, capture_intermediates=True, mutable="intermediates")
    maxima = []
    for (*path, _), outputs in flatten_dict(found["intermediates"]).items():
        leaves = jax.tree.leaves(outputs)
        if path and leaves:
            largest = [jnp.abs(leaf).max().astype(jnp.float32) for leaf in leaves]
            maxima.append({"/".join(path): jnp.stack(largest).max()})
    return maxima


def init(cfg: StageConfig, key: jax.Array):
    """Fresh parameters of the stage's network, boxed with their logical axes."""
    return _init(*_parametrised(cfg), key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(cfg: ModelConfig, inputs, key):
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    return module(cfg).init(key, *inputs)["params"]


def abstract_params(cfg: StageConfig):
    """What `init` returns, as abstract arrays."""
    return _abstract_params(*_parametrised(cfg))


@functools.cache
def _abstract_params(cfg: ModelConfig, inputs):
    return _init.eval_shape(cfg, inputs, jax.random.key(0))


def _parametrised(cfg: StageConfig):
    """What `_init` takes, equal for all settings with the same parameters."""
    # So that it is traced once for all of them, and for shapes and values alike.
    return dataclasses.replace(cfg.model, remat="none"), _inputs(cfg)


def abstract_inputs(cfg: StageConfig):
    """`params, z, logsnr, cond` of `apply` for one image, as abstract arrays."""
    return nn.unbox(abstract_params(cfg)), *_inputs(cfg)


def _inputs(cfg: StageConfig):
    size, low = cfg.train_size, cfg.train_lowres_size
    augmented = low and cfg.diffusion.lowres_augmentation

    def spec(dtype, *shape):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    length, dim = text_shape(cfg.text)
    cond = Cond(
        text=spec(jnp.bfloat16, length, dim),
        mask=spec(jnp.bool_, length),
        lowres=spec(jnp.float32, low, low, 3) if low else None,
        aug_logsnr=spec(jnp.float32) if augmented else None,
    )
    return spec(jnp.float32, size, size, 3), spec(jnp.float32), cond
