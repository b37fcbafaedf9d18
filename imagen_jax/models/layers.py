"""Layers whose parameters carry logical axes, which `sharding.RULES` lays on a mesh.

Parameters and the statistics of normalisations are float32; `dtype` is the type that
is computed in.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from imagen_jax.models.convolution import convolve
from imagen_jax.sharding import gather_fsdp, split_rows

_lecun = nn.initializers.lecun_normal()
_zeros = nn.initializers.zeros_init()


def _parameter(init, *axes):
    return nn.with_logical_partitioning(init, axes)


def _kernel(init, *axes):
    """Arguments of a flax layer: how its kernel is initialised and how it is gathered.

    It is cast to the compute type first, which halves what devices exchange.
    """

    def promote(x, kernel, bias, *, dtype):
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
        return split_rows(x), gather_fsdp(kernel, axes), bias

    return {"kernel_init": _parameter(init, *axes), "promote_dtype": promote}


def dense(features: int, dtype, *, zero: bool = False, name: str | None = None):
    """`[..., C] -> [..., features]`; `zero` starts it at zero."""
    return nn.Dense(
        features,
        dtype=dtype,
        bias_init=_parameter(_zeros, "norm"),
        name=name,
        **_kernel(_zeros if zero else _lecun, "in", "out"),
    )


def conv(
    features: int,
    dtype,
    *,
    kernel: int = 3,
    stride: int = 1,
    zero: bool = False,
    name: str | None = None,
):
    """`[B, H, W, C] -> [B, H / stride, W / stride, features]`, zero padded."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        dtype=dtype,
        conv_general_dilated=convolve,
        bias_init=_parameter(_zeros, "norm"),
        name=name,
        **_kernel(_zeros if zero else _lecun, "kernel_h", "kernel_w", "in", "out"),
    )


class GroupNorm(nn.Module):
    """GroupNorm (arXiv 1803.08494), with the scale and shift that condition it.

    Both are folded into one product and one sum per pixel, in float32; flax's GroupNorm
    has more of them, and no scale and shift (docs/decisions.md).
    """

    num_groups: int  # of equally many channels
    dtype: jnp.dtype  # of the result
    epsilon: float = 1e-5  # added to the variance

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scale: jax.Array | None = None,
        shift: jax.Array | None = None,
    ) -> jax.Array:
        """`[B, H, W, C]` normalised, times `1 + scale`, plus `shift`, both `[B, C]`."""
        ones = nn.initializers.ones_init()
        channels = x.shape[-1]
        gamma = self.param("scale", _parameter(ones, "norm"), (channels,), jnp.float32)
        beta = self.param("bias", _parameter(_zeros, "norm"), (channels,), jnp.float32)
        mean, variance = self.moments(x)
        factor = gamma * jax.lax.rsqrt(variance + self.epsilon)
        summand = beta - mean * factor
        if scale is not None:
            gain = 1 + scale.astype(jnp.float32)
            factor, summand = factor * gain, summand * gain + shift.astype(jnp.float32)
        factor, summand = factor[:, None, None], summand[:, None, None]
        return (x.astype(jnp.float32) * factor + summand).astype(self.dtype)

    @nn.nowrap
    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each channel's group, `[B, C]` float32."""
        x = x.astype(jnp.float32)

        def group_means(values):
            groups = values.mean((1, 2)).reshape(len(x), self.num_groups, -1)
            means = jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape)
            return means.reshape(len(x), -1)

        mean, square = map(group_means, (x, jnp.square(x)))
        return mean, jnp.maximum(0.0, square - jnp.square(mean))


def group_norm(channels: int, dtype, *, name: str | None = None) -> GroupNorm:
    """GroupNorm with 32 groups, or fewer so that each has at least 4 channels.

    Groups of one channel would lose the channels' means: the colours of an image.
    """
    most = max(1, min(32, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return GroupNorm(groups, dtype, name=name)


def layer_norm(dtype, *, name: str | None = None):
    """LayerNorm over the last axis."""
    return nn.LayerNorm(
        epsilon=1e-5,
        dtype=dtype,
        bias_init=_parameter(_zeros, "norm"),
        scale_init=_parameter(nn.initializers.ones_init(), "norm"),
        name=name,
    )


def heads(num_heads: int, head_channels: int, dtype, *, name: str):
    """`[B, T, C] -> [B, T, heads, head_channels]`."""
    return nn.DenseGeneral(
        (num_heads, head_channels),
        dtype=dtype,
        bias_init=_parameter(_zeros, "heads", "head_dim"),
        name=name,
        **_kernel(_lecun, "in", "heads", "head_dim"),
    )


def noise_features(logsnr: jax.Array, channels: int) -> jax.Array:
    """`[B]` log-SNR to `[B, channels]` float32 sines and cosines.

    The inverse of the cosine schedule maps the log-SNR to (0, 1) (arXiv 2202.00512),
    which is embedded like a time step in [0, 1000] (arXiv 2006.11239).
    """
    t = jnp.arctan(jnp.exp(-logsnr / 2)) / (math.pi / 2)
    half = channels // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    angles = 1000 * t[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def space_to_depth(x: jax.Array, p: int) -> jax.Array:
    """`[B, H, W, C] -> [B, H / p, W / p, p * p * C]`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: jax.Array, p: int) -> jax.Array:
    """Inverts `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c // (p * p))


def upsample(x: jax.Array) -> jax.Array:
    """Twice the height and width, by nearest neighbours."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def downsample(x: jax.Array) -> jax.Array:
    """Half the height and width, by means of 2 x 2."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))
