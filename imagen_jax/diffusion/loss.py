"""The training loss of base and super-resolution stages."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from imagen_jax.batch import Batch, Cond, downsample, to_float
from imagen_jax.config import DiffusionConfig, StageConfig
from imagen_jax.diffusion import gaussian
from imagen_jax.diffusion.schedule import logsnr_schedule

# `(z [B, H, W, 3], logsnr [B], cond) -> [B, H, W, 3]`.
Denoiser = Callable[[jax.Array, jax.Array, Cond], jax.Array]

# Borders of the buckets of `loss_by_logsnr`; the outermost buckets have no other end.
LOGSNR_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


@flax.struct.dataclass
class NoisedBatch:
    """The network's inputs and targets for a batch, float32."""

    z: jax.Array  # [B, H, W, 3], the noised image
    logsnr: jax.Array  # [B], its noise level
    cond: Cond  # with captions dropped and the low-resolution image augmented
    target: jax.Array  # [B, H, W, 3], the network's perfect output
    weight: jax.Array  # [B], weight of the squared error


def noise_batch(batch: Batch, key: jax.Array, cfg: StageConfig) -> NoisedBatch:
    """Draws all the randomness of one training step.

    An example's randomness depends only on `key`, which is the step's, and on its
    position in the global batch, so it is the same on any mesh.
    """
    size = batch.image.shape[0]
    x0 = to_float(batch.image)
    key_t, key_example = jax.random.split(key)
    keys = jax.vmap(lambda i: jax.random.fold_in(key_example, i))(jnp.arange(size))
    key_eps, key_drop, key_level, key_aug = jax.vmap(
        lambda k: jax.random.split(k, 4), out_axes=1
    )(keys)

    # Uniform in [0, 1) for each example, and evenly spread over the batch to lower the
    # variance of the loss. Source: VDM (arXiv 2107.00630) App. I.1.
    t = (jax.random.uniform(key_t) + jnp.arange(size) / size) % 1.0
    logsnr, slope = jax.jvp(
        lambda t: logsnr_schedule(t, cfg.diffusion), (t,), (jnp.ones_like(t),)
    )
    eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:]))(key_eps)

    # Caption dropout: zeroed embeddings for a share of examples (paper 4.1).
    keep = jax.vmap(jax.random.uniform)(key_drop) >= cfg.diffusion.text_dropout
    text = jnp.where(keep[:, None, None], batch.text, 0)
    mask = batch.mask & keep[:, None]

    cond = Cond(text=text, mask=mask)
    if cfg.lowres_size:
        lowres = to_float(downsample(batch.image, cfg.train_lowres_size))
        level = jax.vmap(jax.random.uniform)(key_level)
        noise = jax.vmap(lambda k: jax.random.normal(k, lowres.shape[1:]))(key_aug)
        cond = augment(cond, lowres, level, noise, cfg)
    return NoisedBatch(
        z=gaussian.diffuse(x0, logsnr, eps),
        logsnr=logsnr,
        cond=cond,
        target=gaussian.prediction_target(x0, eps, logsnr, cfg.diffusion.prediction),
        weight=loss_weight(logsnr, slope, cfg.diffusion),
    )


def loss_weight(logsnr: jax.Array, slope: jax.Array, cfg: DiffusionConfig) -> jax.Array:
    """The weights `[B]` of the squared errors of a network's outputs.

    | weighting | weight of the squared error of eps            | source            |
    |-----------|-----------------------------------------------|-------------------|
    | "plain"   | 1 for what is predicted, eps or not           | the paper, App. A |
    | "min_snr" | `min(SNR, gamma) / SNR`                       | arXiv 2303.09556  |
    | "sigmoid" | `sigmoid(bias - logsnr)` times `-dlogsnr/dt`  | arXiv 2303.00848  |

    The factor `-dlogsnr/dt` makes the expected loss independent of the schedule. The
    squared error of x0 is that of eps over the SNR; that of v is that of eps over
    `alpha**2`. `slope` `[B]` is the schedule's derivative in time, `dlogsnr/dt`.
    """
    if cfg.weighting == "plain":
        return jnp.ones_like(logsnr)
    if cfg.weighting == "min_snr":
        of_eps = jnp.minimum(1.0, cfg.min_snr_gamma * jnp.exp(-logsnr))
    else:
        of_eps = -slope * jax.nn.sigmoid(cfg.sigmoid_bias - logsnr)
    if cfg.prediction == "eps":
        return of_eps
    return of_eps * (
        jnp.exp(logsnr) if cfg.prediction == "x0" else jax.nn.sigmoid(logsnr)
    )


def augment(
    cond: Cond, lowres: jax.Array, level: jax.Array, noise: jax.Array, cfg: StageConfig
) -> Cond:
    """Noise-conditioning augmentation (paper Sec. 2.4, Fig. A.32).

    Training and sampling both call it, so the network is always told the level of the
    noise that its input has. With `lowres_augmentation` off the image stays clean, and
    no level is told.

    Args:
      cond: conditioning without `lowres` and `aug_logsnr`.
      lowres: `[B, h, w, 3]` float32 in [-1, 1], clean.
      level: `[B]` in [0, 1], a time of the stage's forward process.
      noise: the shape of `lowres`, standard normal.
    """
    if not cfg.diffusion.lowres_augmentation:
        return cond.replace(lowres=lowres)
    logsnr = logsnr_schedule(level, cfg.diffusion)
    noised = gaussian.diffuse(lowres, logsnr, noise)
    return cond.replace(lowres=noised, aug_logsnr=logsnr)


def losses(denoise: Denoiser, noised: NoisedBatch) -> jax.Array:
    """Weighted mean squared errors of the network's outputs, `[B]` float32.

    With "eps" and the "plain" weighting this is the paper's loss (Eq. 3, App. A).
    """
    output = denoise(noised.z, noised.logsnr, noised.cond)
    error = jnp.square(output.astype(jnp.float32) - noised.target)
    return noised.weight * error.mean((1, 2, 3))


def loss_by_logsnr(losses: jax.Array, logsnr: jax.Array) -> dict[str, jax.Array]:
    """Sums `[K]` and counts `[K]` of losses by log-SNR, the noisiest bucket first."""
    bucket = jnp.searchsorted(jnp.array(LOGSNR_EDGES), logsnr)
    member = jax.nn.one_hot(bucket, len(LOGSNR_EDGES) + 1)
    return {"sum": (losses[:, None] * member).sum(0), "count": member.sum(0)}
