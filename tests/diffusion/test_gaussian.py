"""The Gaussian process against Bayes' rule in float64 and against diffusers.

The recorded steps are made by tests/references/make_diffusers.py.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import gaussian

REFERENCE = pathlib.Path(__file__).parents[1] / "references" / "diffusers.npz"
EPS = np.finfo(np.float32).eps
LOGSNR = np.array([-20, -12, -5, -1, 0, 0.3, 5, 12, 20], np.float32)
SHAPE = (len(LOGSNR), 4, 4, 3)


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE, allow_pickle=False) as file:
        return dict(file)


def _draw(n, shape=SHAPE):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(n)]


def _exact(logsnr):
    """Alpha and sigma in float64, `[B, 1, 1, 1]`."""
    logsnr = np.asarray(logsnr, np.float64).reshape(-1, 1, 1, 1)
    return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5


def test_alpha_and_sigma():
    alpha, sigma = (np.float64(a) for a in gaussian.alpha_sigma(jnp.asarray(LOGSNR)))
    want = [a.ravel() for a in _exact(LOGSNR)]
    # Relative, also where they are tiny: an exponential, a sum, a quotient, a root.
    np.testing.assert_allclose([alpha, sigma], want, rtol=4 * EPS)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=4 * EPS)


def test_diffuse_and_targets_are_the_definitions():
    x0, eps = _draw(2)
    alpha, sigma = _exact(LOGSNR)
    size = np.abs(x0) + np.abs(eps)
    z = gaussian.diffuse(x0, LOGSNR, eps)
    assert (np.abs(z - (alpha * x0 + sigma * eps)) <= 8 * EPS * size).all()
    wants = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}
    for prediction, want in wants.items():
        have = gaussian.prediction_target(x0, eps, LOGSNR, prediction)
        assert (np.abs(have - want) <= 8 * EPS * size).all(), prediction


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_predicted_x0_inverts_the_target(prediction):
    x0, eps = _draw(2)
    z = gaussian.diffuse(x0, LOGSNR, eps)
    target = gaussian.prediction_target(x0, eps, LOGSNR, prediction)
    have = gaussian.predicted_x0(target, z, LOGSNR, prediction)
    # From eps, z's rounding is divided by alpha; the others are combinations with
    # factors of at most 1.
    alpha, _ = _exact(LOGSNR)
    gain = {"x0": 0, "eps": 1 / alpha, "v": 1}[prediction]
    assert (np.abs(have - x0) <= 10 * EPS * gain * (np.abs(x0) + np.abs(eps))).all()


@pytest.mark.parametrize(
    ("logsnr_t", "logsnr_s"), [(-20, -19), (-3, 2), (0, 1e-3), (5, 7), (-20, 20)]
)
def test_ancestral_step_is_bayes_rule(logsnr_t, logsnr_s):
    x0, z = _draw(2)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        [a.item() for a in _exact(np.float32(x))] for x in (logsnr_t, logsnr_s)
    )
    # q(z_t | z_s) = N(decay z_s, spread), from q(z_t | x0) and q(z_s | x0).
    decay = alpha_t / alpha_s
    spread = sigma_t**2 - decay**2 * sigma_s**2
    # Product of two normal densities in z_s: precisions add.
    variance = 1 / (1 / sigma_s**2 + decay**2 / spread)
    mean = variance * (alpha_s * x0 / sigma_s**2 + decay * z / spread)
    between = np.exp(np.mean(np.log([variance, spread])))
    # `spread` itself cancels in float64 when the levels are close.
    rtol = 20 * EPS + 1e-15 * sigma_t**2 / spread
    for gamma, want in [(0.0, variance), (1.0, spread), (0.5, between)]:
        have, deviation = gaussian.ancestral_step(
            x0, z, jnp.float32(logsnr_t), jnp.float32(logsnr_s), gamma
        )
        np.testing.assert_allclose(deviation, np.sqrt(want), rtol=rtol)
        # Factors of z and x0 are at most 1 each.
        assert (np.abs(have - mean) <= rtol * (np.abs(z) + np.abs(x0))).all()


def test_a_step_to_the_same_level_stays():
    x0, z = _draw(2)
    level = jnp.float32(1.5)
    np.testing.assert_allclose(
        gaussian.ddim_step(x0, z, level, level), z, rtol=0, atol=40 * EPS
    )
    mean, deviation = gaussian.ancestral_step(x0, z, level, level, 0.3)
    np.testing.assert_allclose(mean, z, rtol=4 * EPS)
    assert deviation == 0


def test_ddim_step_keeps_the_noise():
    """With the true x0 it lands on the same eps at the other level."""
    x0, eps = _draw(2)
    for t, s in [(-20, -3), (-1, 1), (3, 20)]:
        z = gaussian.diffuse(x0, jnp.full(len(x0), float(t)), eps)
        have = gaussian.ddim_step(x0, z, jnp.float32(t), jnp.float32(s))
        want = gaussian.diffuse(x0, jnp.full(len(x0), float(s)), eps)
        # The rounding of z grows by sigma_s / sigma_t < 1.
        assert (np.abs(have - want) <= 12 * EPS * (np.abs(x0) + np.abs(eps))).all()


@pytest.mark.parametrize(
    "name",
    [
        f"{prediction}_{step}"
        for prediction in ("eps", "v")
        for step in ("950_900", "500_450", "50_0", "999_998", "500_499", "1_0")
    ],
)
def test_steps_equal_diffusers(reference, name):
    prediction, t, s = name.split("_")
    alpha_squared = reference["alphas_cumprod"][[int(t), int(s)]]
    logsnr_t, logsnr_s = jnp.float32(np.log(alpha_squared / (1 - alpha_squared)))
    z, output, noise = (jnp.float32(reference[k]) for k in ("z", "output", "noise"))
    x0 = gaussian.predicted_x0(output, z, logsnr_t[None], prediction)
    want = reference[f"x0_{name}"]
    # Relative: from eps at the highest noise, x0 is in the hundreds.
    np.testing.assert_allclose(x0, want, rtol=0, atol=1e-5 * np.abs(want).max())
    have = {"ddim": gaussian.ddim_step(x0, z, logsnr_t, logsnr_s)}
    for gamma, variance in [(0.0, "fixed_small"), (1.0, "fixed_large")]:
        mean, deviation = gaussian.ancestral_step(x0, z, logsnr_t, logsnr_s, gamma)
        have[f"ddpm_{variance}"] = mean + deviation * noise
    for step, value in have.items():
        np.testing.assert_allclose(
            value, reference[f"{step}_{name}"], rtol=0, atol=1e-5, err_msg=step
        )


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_dpm_solver_equals_diffusers(reference, prediction):
    """A run of eight steps, the first and the last of them of first order."""
    logsnr = jnp.float32(-2 * np.log(reference["dpmpp_sigma_over_alpha"][:-1]))
    z, before = jnp.float32(reference["z"]), jnp.zeros(())
    run = reference[f"dpmpp_{prediction}"]
    for i in range(8):
        answer = jnp.float32(reference["answers"][i])
        x0 = gaussian.predicted_x0(answer, z, logsnr[i][None], prediction)
        if i == 7:
            # Its target is free of noise: the estimate itself.
            z = x0
        else:
            earlier = logsnr[max(i - 1, 0)]
            z = gaussian.dpmpp_step(x0, before, z, earlier, logsnr[i], logsnr[i + 1])
        before = x0
        # Relative: from eps at the highest noise, x0 is in the hundreds.
        scale = max(1.0, np.abs(x0).max())
        np.testing.assert_allclose(z, run[i], rtol=0, atol=1e-5 * scale, err_msg=str(i))
        z = jnp.float32(run[i])


def test_dpm_solver_is_of_first_order_without_a_step_before():
    x0, before, z = _draw(3)
    t, s = jnp.float32(-1), jnp.float32(2)
    np.testing.assert_array_equal(
        gaussian.dpmpp_step(x0, before, z, t, t, s), gaussian.ddim_step(x0, z, t, s)
    )


def test_expand_is_per_example():
    values = jnp.arange(3.0)
    want = (3, 1, 1, 1)
    assert gaussian.expand(values, jnp.zeros((3, 2, 2, 3))).shape == want
    assert jax.eval_shape(gaussian.expand, values, jnp.zeros((3, 4))).shape == (3, 1)
