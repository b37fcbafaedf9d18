"""Schedules against their formulas in float64."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import DiffusionConfig, SamplerConfig
from imagen_jax.diffusion.schedule import logsnr_schedule, sampling_logsnr

REFERENCE = pathlib.Path(__file__).parents[1] / "references" / "diffusers.npz"
EPS = np.finfo(np.float32).eps
# Dense at both ends, where log-SNRs are steep: 1 - t is exact for these.
SMALL = 2.0 ** -np.arange(1, 24)
TIMES = np.unique(np.concatenate([[0, 1], SMALL, 1 - SMALL, np.linspace(0, 1, 101)]))
TIMES = TIMES.astype(np.float32)


def _logsnr(schedule, t=TIMES, **clip):
    return np.asarray(logsnr_schedule(jnp.asarray(t), _cfg(schedule, **clip)))


def _cfg(schedule, **clip):
    return DiffusionConfig(schedule=schedule, **clip)


@pytest.mark.parametrize("clip", [20.0, 15.0])
def test_cosine_is_the_published_formula_but_for_its_ends(clip):
    t = np.linspace(0.01, 0.99, 99)
    squeeze = math.atan(math.exp(-clip / 2))
    # The squeezed angle is off by at most `squeeze`; 4 / sin(2 angle) is the slope of
    # the log-SNR, largest where this grid ends.
    bound = 4 * squeeze / math.sin(math.pi * 0.01 - 2 * squeeze) + 40 * EPS
    have = _logsnr("cosine", t, logsnr_min=-clip, logsnr_max=clip)
    assert np.abs(have - -2 * np.log(np.tan(np.pi * t / 2))).max() <= bound


@pytest.mark.parametrize(("lowest", "highest"), [(-20.0, 20.0), (-12.0, 17.0)])
def test_cosine_keeps_float32_precision_at_both_ends(lowest, highest):
    t = TIMES.astype(np.float64)
    at_0, at_1 = math.atan(math.exp(-highest / 2)), math.atan(math.exp(-lowest / 2))
    want = -2 * np.log(np.tan(at_0 + (at_1 - at_0) * t))
    have = _logsnr("cosine", logsnr_min=lowest, logsnr_max=highest)
    # Four roundings before the tangent, each worth at most 2 * pi / 2 in the log-SNR;
    # two after it, relative to the result.
    assert (np.abs(have - want) <= EPS * (4 * math.pi + np.abs(want))).all()
    np.testing.assert_allclose(have[[0, -1]], [highest, lowest], rtol=2 * EPS)


def test_cosine_is_symmetric():
    t = TIMES[TIMES >= 0.5]  # so that 1 - t is exact
    np.testing.assert_array_equal(_logsnr("cosine", t), -_logsnr("cosine", 1 - t))


def test_linear_is_the_integral_of_beta():
    # Trapezoids are exact for a linear integrand.
    grid = TIMES.astype(np.float64)
    beta = 1000 * (1e-4 + (0.02 - 1e-4) * grid)
    steps = np.diff(grid) * (beta[1:] + beta[:-1]) / 2
    integral = np.concatenate([[0], np.cumsum(steps)])
    with np.errstate(divide="ignore"):
        want = np.minimum(-np.log(np.expm1(integral)), 20)
    have = _logsnr("linear")
    # `expm1` multiplies the four roundings of the integral by at most 1 + integral.
    assert (np.abs(have - want) <= EPS * (4 * (1 + integral) + np.abs(want))).all()
    assert have[0] == 20.0


def test_linear_is_near_the_discrete_process():
    with np.load(REFERENCE, allow_pickle=False) as file:
        alphas_cumprod = file["alphas_cumprod"]
    t = np.arange(1, 1001) / 1000
    have = np.log1p(np.exp(-_logsnr("linear", t).astype(np.float64)))
    want = -np.log(alphas_cumprod)
    # -log(1 - beta) exceeds beta by less than beta**2 / 2 / (1 - beta); the two grids
    # of beta, 999 and 1000 intervals, differ by less than 1e-5 per step.
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    bound = np.cumsum(beta**2 / 2 / (1 - beta) + 1e-5) + 1e-5
    assert (np.abs(have - want) <= bound).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falls_within_the_clip(schedule):
    t = np.linspace(0, 1, 2001, dtype=np.float32)
    logsnr = _logsnr(schedule, t, logsnr_min=-9.0, logsnr_max=9.0)
    assert logsnr[0] == pytest.approx(9) and logsnr[-1] == pytest.approx(-9)
    inside = np.abs(logsnr) < 9 - 1e-5
    assert inside.sum() > 1500
    assert (np.diff(logsnr) <= 0).all() and (np.diff(logsnr[inside]) < 0).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_is_finite_at_the_ends(schedule):
    slope = jax.vmap(jax.grad(lambda t: logsnr_schedule(t, _cfg(schedule))))
    ends = jnp.array([0.0, 1.0])
    assert np.isfinite(_logsnr(schedule, ends)).all()
    assert np.isfinite(slope(ends)).all()


def test_the_grid_is_even_in_time_or_in_logsnr():
    cfg, times = _cfg("cosine"), np.linspace(1, 0, 9, dtype=np.float32)
    grid = sampling_logsnr(cfg, SamplerConfig(steps=8))
    np.testing.assert_array_equal(grid, _logsnr("cosine", times))
    grid = np.asarray(sampling_logsnr(cfg, SamplerConfig(steps=8, grid="logsnr")))
    np.testing.assert_allclose(grid, np.linspace(-20, 20, 9), atol=80 * EPS)


def test_sampling_may_take_another_schedule_within_the_trained_levels():
    trained = _cfg("cosine", logsnr_min=-12.0, logsnr_max=15.0)
    times = np.linspace(1, 0, 9, dtype=np.float32)
    sampler = SamplerConfig(steps=8, schedule="linear", logsnr_max=9.0)
    grid = sampling_logsnr(trained, sampler)
    want = _logsnr("linear", times, logsnr_min=-12.0, logsnr_max=9.0)
    np.testing.assert_array_equal(grid, want)
    sampler = SamplerConfig(steps=8, logsnr_min=-20.0, logsnr_max=20.0)
    grid = np.asarray(sampling_logsnr(trained, sampler))
    np.testing.assert_allclose(grid[[0, -1]], [-12, 15], rtol=2 * EPS)
