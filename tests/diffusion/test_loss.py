"""The randomness of a training step, and the loss for answers that are known."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import batch as batches
from imagen_jax import config
from imagen_jax.batch import Batch
from imagen_jax.diffusion.gaussian import alpha_sigma, expand
from imagen_jax.diffusion.loss import loss_by_logsnr, losses, noise_batch

EPS = np.finfo(np.float32).eps
# Most of the time goes to compiling.
QUICK = {"xla_backend_optimization_level": 0}


def _cfg(size=8, lowres_size=0, crop_size=0, **diffusion):
    values = {
        "image_size": size,
        "lowres_size": lowres_size,
        "crop_size": crop_size,
        "diffusion": diffusion,
        "text": {"length": 3, "dim": 4},
        "model": {
            "channels": (32,),
            "num_res_blocks": (1,),
            "self_attention": (False,),
            "text_attention": (False,),
        },
    }
    return config.from_dict(values)


def _batch(rows, size=8, seed=0, value=None):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (rows, size, size, 3), np.uint8)
    return Batch(
        image=jnp.asarray(image if value is None else np.full_like(image, value)),
        text=jnp.asarray(rng.uniform(1, 2, (rows, 3, 4)), jnp.bfloat16),
        mask=jnp.asarray(np.arange(rows)[:, None] % 3 >= np.arange(3)),
        id=jnp.arange(rows),
    )


@functools.partial(jax.jit, static_argnames="cfg", compiler_options=QUICK)
def _noise(batch, seed, cfg):
    return noise_batch(batch, jax.random.key(seed), cfg)


def _loss(denoise, batch, cfg):
    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(batch):
        noised = noise_batch(batch, jax.random.key(0), cfg)
        return losses(denoise, noised), noised

    return run(batch)


def _scales(logsnr):
    """Alpha and sigma in float64."""
    logsnr = np.asarray(logsnr, np.float64)
    return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "lowres_size"), [("x0", 0), ("eps", 0), ("v", 0), ("v", 4)]
)
def test_a_perfect_denoiser_has_no_loss(prediction, lowres_size):
    cfg, batch = _cfg(prediction=prediction, lowres_size=lowres_size), _batch(32)
    x0 = batches.to_float(batch.image)

    def perfect(z, logsnr, cond):
        alpha, sigma = alpha_sigma(expand(logsnr, z))
        eps = (z - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[prediction]

    each, noised = _loss(perfect, batch, cfg)
    assert each.shape == (32,) and each.dtype == jnp.float32
    # The roundings of z (below 8, as normal numbers are) divided by sigma.
    _, sigma = _scales(noised.logsnr)
    gain = 1 if prediction == "x0" else 1 / sigma
    assert (each <= (4 * 8 * EPS * gain) ** 2).all()


def test_a_zero_denoiser_loses_the_variance_of_the_target():
    """1 for eps, and alpha**2 + sigma**2 x0**2 for v."""
    batch = _batch(256, value=255)  # x0 = 1

    def zero(z, logsnr, cond):
        return jnp.zeros_like(z, jnp.bfloat16)

    for prediction in ("eps", "v"):
        cfg = _cfg(prediction=prediction)
        each, noised = _loss(zero, batch, cfg)
        # Four standard errors of a mean of squared (at most unit) normal numbers; for
        # v the mean of the cross term, 2 alpha sigma eps, adds at most as much.
        assert abs(each.mean() - 1) < 2 * 4 * math.sqrt(2 / batch.image.size)
        np.testing.assert_allclose(
            each, np.square(noised.target).mean((1, 2, 3)), rtol=1e-6
        )


def test_the_noised_picture_and_its_target_belong_together():
    batch, cfg = _batch(16), _cfg(prediction="eps")
    noised = _noise(batch, 0, cfg)
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in _scales(noised.logsnr))
    want = alpha * batches.to_float(batch.image) + sigma * noised.target
    np.testing.assert_allclose(noised.z, want, atol=8 * 8 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_caption_dropout(rate):
    rows = 4096
    batch = _batch(rows, size=2)
    cond = _noise(batch, 0, _cfg(2, text_dropout=rate)).cond
    dropped = np.asarray(cond.text == 0).all((1, 2))
    deviation = math.sqrt(rate * (1 - rate) / rows)
    assert abs(dropped.mean() - rate) <= 4 * deviation
    for have, kept in [(cond.text, batch.text), (cond.mask, batch.mask)]:
        assert have.dtype == kept.dtype and have.shape == kept.shape
        assert not have[dropped].any()
        np.testing.assert_array_equal(have[~dropped], kept[~dropped])


def _times(logsnr):
    """The time of a cosine log-SNR, in float64."""
    squeeze = math.atan(math.exp(-10))
    angle = np.arctan(np.exp(-np.asarray(logsnr, np.float64) / 2))
    return (angle - squeeze) / (math.pi / 2 - 2 * squeeze)


def test_times_are_spread_evenly_over_the_batch():
    rows = 16
    for seed in range(3):
        t = _times(_noise(_batch(rows), seed, _cfg()).logsnr)
        assert 0 <= t.min() + 1e-6 and t.max() < 1
        # All gaps are 1 / rows, so every stratum holds exactly one.
        np.testing.assert_allclose(np.diff(np.sort(t)), 1 / rows, atol=1e-5)


def test_times_of_one_position_are_uniform():
    draw = jax.vmap(lambda seed: _noise(_batch(4, size=2), seed, _cfg(2)).logsnr)
    t = _times(draw(jnp.arange(1000)))
    for position in range(4):
        ordered = np.sort(t[:, position])
        # Kolmogorov and Smirnov: exceeded once in 1000 samples.
        distance = np.abs(ordered - (np.arange(1000) + 0.5) / 1000).max()
        assert distance < 1.95 / math.sqrt(1000)


def test_noise_belongs_to_the_position():
    """Not to the rest of the batch or what the batch shows; every key is anew."""
    cfg = _cfg(lowres_size=4, prediction="eps", text_dropout=0.5)
    large = _noise(_batch(8), 0, cfg)
    small = _noise(_batch(4, seed=1), 0, cfg)
    np.testing.assert_array_equal(large.target[:4], small.target)
    np.testing.assert_array_equal(large.cond.aug_logsnr[:4], small.cond.aug_logsnr)
    dropped = [np.asarray(n.cond.text == 0).all((1, 2)) for n in (large, small)]
    np.testing.assert_array_equal(dropped[0][:4], dropped[1])
    other = _noise(_batch(8), 1, cfg)
    rows = np.concatenate([large.target, other.target]).reshape(16, -1)
    # 120 pairs of 192 numbers: five standard errors.
    assert np.abs(np.corrcoef(rows) - np.eye(16)).max() < 5 / math.sqrt(192)
    assert (large.cond.aug_logsnr != other.cond.aug_logsnr).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_low_resolution_noise_is_what_is_announced(schedule):
    cfg = _cfg(32, lowres_size=16, schedule=schedule, prediction="eps")
    x0 = batches.to_float(jnp.uint8(128))
    noised = _noise(_batch(64, size=32, value=128), 0, cfg)
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in _scales(noised.cond.aug_logsnr))
    noise = (np.asarray(noised.cond.lowres) - alpha * np.float64(x0)) / sigma
    n = noise[0].size
    # Five standard errors for each of 64 pictures, and four for all of them.
    assert np.abs(noise.var((1, 2, 3)) - 1).max() < 5 * math.sqrt(2 / n)
    assert abs(np.square(noise).mean() - 1) < 4 * math.sqrt(2 / noise.size)
    # Levels are uniform times, drawn apart from those of the picture.
    if schedule == "cosine":
        level = _times(noised.cond.aug_logsnr)
        assert abs(level.mean() - 0.5) < 4 / math.sqrt(12 * 64)
        assert level.min() < 0.1 and level.max() > 0.9
        gaps = np.diff(np.sort(level))
        assert gaps.max() > 2 / 64
    # Nor is it the noise of the picture.
    of_picture = np.asarray(noised.target)[:, :16, :16]
    correlation = np.corrcoef(noise.ravel(), of_picture.ravel())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(noise.size)


@pytest.mark.slow
@pytest.mark.parametrize("crop_size", [0, 16])
def test_the_low_resolution_picture_is_that_of_the_base(crop_size):
    """The noise cancels in the difference of two batches under one key."""
    cfg = _cfg(32, lowres_size=8, crop_size=crop_size)
    size = crop_size or 32
    one, other = _batch(8, size, seed=1), _batch(8, size, seed=2)
    a, b = _noise(one, 0, cfg), _noise(other, 0, cfg)
    low = [
        np.float64(batches.to_float(batches.downsample(x.image, size // 4)))
        for x in (one, other)
    ]
    alpha, _ = _scales(a.cond.aug_logsnr)
    want = alpha.reshape(-1, 1, 1, 1) * (low[0] - low[1])
    assert a.cond.lowres.shape == want.shape
    np.testing.assert_allclose(a.cond.lowres - b.cond.lowres, want, atol=16 * EPS)


def test_without_augmentation_the_low_resolution_picture_is_clean():
    cfg = config.from_dict(
        {
            "image_size": 8,
            "lowres_size": 4,
            "diffusion": {"lowres_augmentation": False},
            "sampler": {"aug_level": 0.0},
            "model": dataclasses.asdict(_cfg().model),
        }
    )
    batch = _batch(4)
    noised = _noise(batch, 0, cfg)
    clean = batches.to_float(batches.downsample(batch.image, 4))
    np.testing.assert_array_equal(noised.cond.lowres, clean)
    assert noised.cond.aug_logsnr is None


def test_a_base_stage_has_no_low_resolution_picture():
    cond = _noise(_batch(2), 0, _cfg()).cond
    assert cond.lowres is None and cond.aug_logsnr is None


def _weights(weighting, prediction, schedule="cosine", **values):
    cfg = _cfg(weighting=weighting, prediction=prediction, schedule=schedule, **values)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(batch):
        noised = noise_batch(batch, jax.random.key(0), cfg)
        return noised.logsnr, noised.weight

    logsnr, weight = run(_batch(64))
    return np.float64(logsnr), np.float64(weight)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_is_the_published_weight(prediction):
    """Of the errors of x0, eps and v: arXiv 2303.09556, Sec. 3.4 and App."""
    logsnr, weight = _weights("min_snr", prediction, min_snr_gamma=3.0)
    snr = np.exp(logsnr)
    of_x0 = np.minimum(snr, 3.0)
    want = {"x0": of_x0, "eps": of_x0 / snr, "v": of_x0 / (snr + 1)}[prediction]
    # The exponential multiplies the rounding of the log-SNR by its size.
    np.testing.assert_allclose(weight, want, rtol=(20 + 8) * EPS)
    assert (snr > 3).any() and (snr < 3).any()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_sigmoid_weight_is_of_the_logsnr(prediction, schedule):
    """Times the slope of the schedule, so that all schedules mean one loss."""
    logsnr, weight = _weights("sigmoid", prediction, schedule, sigmoid_bias=-1.0)
    snr = np.exp(logsnr)
    if schedule == "cosine":
        squeeze = math.pi / 2 - 2 * math.atan(math.exp(-10))
        slope = -4 * squeeze / np.sin(2 * np.arctan(np.exp(-logsnr / 2)))
    else:
        # `0.1 t + 9.95 t**2` is log(1 + 1 / SNR).
        integral = np.log1p(1 / snr)
        t = (-0.1 + np.sqrt(0.01 + 4 * 9.95 * integral)) / (2 * 9.95)
        slope = -(0.1 + 19.9 * t) * (1 + snr)
    of_eps = -slope / (1 + np.exp(logsnr + 1))
    factor = {"eps": 1, "x0": snr, "v": snr / (1 + snr)}[prediction]
    np.testing.assert_allclose(weight, factor * of_eps, rtol=2e-5)


def test_plain_weights_are_one():
    assert (_weights("plain", "v")[1] == 1).all()


def test_losses_are_the_weighted_errors():
    batch = _batch(16)

    def zero(z, logsnr, cond):
        return jnp.zeros_like(z)

    cfg = _cfg(prediction="v", weighting="min_snr")
    each, noised = _loss(zero, batch, cfg)
    want = noised.weight * np.square(noised.target).mean((1, 2, 3))
    np.testing.assert_allclose(each, want, rtol=8 * EPS)


def test_buckets_hold_every_loss_once():
    logsnr = jnp.array([-20.0, -6.5, -5.0, 0.0, 0.1, 3.0, 6.0, 6.1, 20.0])
    have = jax.jit(loss_by_logsnr)(jnp.arange(1.0, 10.0), logsnr)
    assert have["count"].tolist() == [2, 1, 0, 1, 1, 1, 1, 2]
    assert have["sum"].tolist() == [3, 3, 0, 4, 5, 6, 7, 17]
