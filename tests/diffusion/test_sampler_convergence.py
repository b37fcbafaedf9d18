"""Samplers in float64 against closed forms: data whose best denoiser is known.

For `x0 ~ N(m, C)` in the three channels of each pixel the mean of x0 given z is
linear in z, and the probability-flow ODE leads along
`z = alpha m + (alpha**2 C + sigma**2 I)**(1/2) u` with one `u` for all levels. A
mixture of two normal distributions has no closed path; scipy integrates it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from imagen_jax.batch import Cond
from imagen_jax.config import DiffusionConfig, SamplerConfig
from imagen_jax.diffusion.gaussian import alpha_sigma, expand
from imagen_jax.diffusion.sampler import guidance_weights, sample
from imagen_jax.diffusion.schedule import sampling_logsnr

MEAN = np.array([0.3, -0.2, 0.0])
COVARIANCE = np.array([[0.25, 0.1, 0.0], [0.1, 0.09, -0.02], [0.0, -0.02, 0.5]])
# Of the mixture, in every channel by itself.
SHARES, MEANS, SCALES = (
    np.array([0.3, 0.7]),
    np.array([-0.6, 0.5]),
    np.array([0.2, 0.3]),
)
# Most of the time goes to compiling.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


def _as(prediction, x0, z, logsnr):
    """What a network that predicts `prediction` answers for an estimate of x0."""
    alpha, sigma = alpha_sigma(expand(logsnr, z))
    eps = (z - alpha * x0) / sigma
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[prediction]


def _normal(z, logsnr, cond):
    """The mean of normal x0 given z."""
    alpha, sigma = (a[..., None] for a in alpha_sigma(expand(logsnr, z)))
    spread = alpha**2 * COVARIANCE + sigma**2 * np.eye(3)
    gain = alpha * COVARIANCE @ jnp.linalg.inv(spread)
    return MEAN + (gain @ (z - alpha[..., 0] * MEAN)[..., None])[..., 0]


def _mixed(z, logsnr, cond):
    """The mean of mixed x0 given z."""
    alpha, sigma = (a[..., None] for a in alpha_sigma(expand(logsnr, z)))
    spread = alpha**2 * SCALES**2 + sigma**2
    off = z[..., None] - alpha * MEANS
    share = jax.nn.softmax(
        jnp.log(SHARES) - jnp.log(spread) / 2 - off**2 / spread / 2, axis=-1
    )
    return (share * (MEANS + alpha * SCALES**2 / spread * off)).sum(-1)


def _run(data, rows=2, size=4, prediction="x0", schedule="cosine", seed=0, **options):
    """The last estimates, and the noise that they started from."""
    keys = jax.random.split(jax.random.key(seed), rows)
    cond = Cond(text=jnp.ones((rows, 1, 1)), mask=jnp.ones((rows, 1), bool))
    diffusion = DiffusionConfig(prediction=prediction, schedule=schedule)
    sampler = SamplerConfig(**{"threshold": "none", **options})

    def denoise(z, logsnr, cond):
        return _as(prediction, data(z, logsnr, cond), z, logsnr)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(keys):
        shape, weights = (size, size, 3), guidance_weights(sampler)
        weights = jnp.tile(weights[:, None], rows)
        x0, _ = sample(denoise, keys, cond, shape, diffusion, sampler, weights)
        first = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        noise = jax.vmap(lambda key: jax.random.normal(key, (size, size, 3)))(first)
        return x0, noise, sampling_logsnr(diffusion, sampler)

    return tuple(np.asarray(a) for a in run(keys))


def _scales(logsnr):
    return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5


def _on_the_path(noise, logsnr):
    """The estimate of normal x0 at the last level of the exact path from `noise`."""
    values, vectors = np.linalg.eigh(COVARIANCE)
    (alpha_0, sigma_0), (alpha, sigma) = map(_scales, (logsnr[0], logsnr[-2]))
    u = (noise - alpha_0 * MEAN) @ vectors / np.sqrt(alpha_0**2 * values + sigma_0**2)
    return MEAN + u * alpha * values / np.sqrt(alpha**2 * values + sigma**2) @ vectors.T


def _mixed_path(noise, logsnr):
    """The same for the mixture.

    `dz / d log(sigma / alpha) = sigma eps - sigma**2 z`
    """
    shape = noise.shape

    def slope(log_ratio, z):
        level = jnp.full(shape[0], -2 * log_ratio)
        z = z.reshape(shape)
        _, sigma = alpha_sigma(level[0])
        eps = _as("eps", _mixed(z, level, None), z, level)
        return (sigma * eps - sigma**2 * z).ravel()

    span = -logsnr[0] / 2, -logsnr[-2] / 2
    end = scipy.integrate.solve_ivp(
        jax.jit(slope), span, noise.ravel(), method="DOP853", rtol=1e-10, atol=1e-12
    ).y[:, -1]
    z, level = end.reshape(shape), np.full(shape[0], logsnr[-2])
    return np.asarray(_mixed(z, level, None))


def _slope(data, path, **options):
    """Of the largest error's logarithm over that of the number of steps.

    Steps are even in log-SNR. Of steps even in time those next to the ends keep their
    length in log-SNR, log 4, whatever their number, and the order is lower there
    (docs/diffusion.md).
    """
    steps, errors = (64, 256), []
    for n in steps:
        x0, noise, logsnr = _run(data, steps=n, grid="logsnr", **options)
        errors.append(np.abs(x0 - path(noise, logsnr)).max())
    return np.diff(np.log(errors))[0] / np.diff(np.log(steps))[0]


# Of an error `c h**p (1 + d h + ...)` the slope is off p by `d h / log 4`; h, half of
# a step in log-SNR, is 0.3 at the fewest steps.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "schedule", "name", "order"),
    [
        ("eps", "linear", "dpmpp", 2),
        ("x0", "cosine", "ddim", 1),
        ("v", "cosine", "dpmpp", 2),
        ("v", "linear", "ddim", 1),
    ],
)
def test_normal_data_converge_to_the_closed_form(prediction, schedule, name, order):
    slope = _slope(
        _normal, _on_the_path, name=name, prediction=prediction, schedule=schedule
    )
    assert abs(-slope - order) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "name", "order"), [("linear", "ddim", 1), ("cosine", "dpmpp", 2)]
)
def test_mixed_data_converge_to_the_integrated_ode(schedule, name, order):
    slope = _slope(_mixed, _mixed_path, name=name, schedule=schedule)
    assert abs(-slope - order) < 0.15


def test_steps_even_in_time_converge_too():
    """On the cosine schedule, the demo's and the paper's."""
    errors = {}
    for name in ("ddim", "dpmpp"):
        x0, noise, logsnr = _run(_normal, name=name, steps=256)
        errors[name] = np.abs(x0 - _on_the_path(noise, logsnr)).max()
    # Second order is worth something at this number of steps already.
    assert errors["dpmpp"] < 0.2 * errors["ddim"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "schedule", "gamma"),
    [
        ("eps", "linear", 1.0),
        ("v", "cosine", 0.0),
        ("x0", "cosine", 0.5),
    ],
)
def test_ancestral_samples_have_the_datas_moments(prediction, schedule, gamma):
    """Mean and covariance."""
    options = {"prediction": prediction, "schedule": schedule, "gamma": gamma}
    x0, _, _ = _run(_normal, 4, 32, name="ddpm", steps=1024, **options)
    pixels = x0.reshape(-1, 3)
    # Four standard errors of the moments of so many normal vectors.
    variances = np.diag(COVARIANCE)
    assert (np.abs(pixels.mean(0) - MEAN) < 4 * np.sqrt(variances / len(pixels))).all()
    error = np.sqrt((np.outer(variances, variances) + COVARIANCE**2) / len(pixels))
    assert (np.abs(np.cov(pixels.T) - COVARIANCE) < 4 * error).all()


@pytest.mark.slow
def test_ancestral_samples_have_the_mixtures_moments():
    x0, _, _ = _run(_mixed, 4, 32, name="ddpm", steps=1024, gamma=1.0)
    first = SHARES @ MEANS
    second = SHARES @ (MEANS**2 + SCALES**2) - first**2
    fourth = SHARES @ (
        (MEANS - first) ** 4 + 6 * (MEANS - first) ** 2 * SCALES**2 + 3 * SCALES**4
    )
    n = x0.size
    assert abs(x0.mean() - first) < 4 * np.sqrt(second / n)
    assert abs(x0.var() - second) < 4 * np.sqrt((fourth - second**2) / n)
    share = SHARES @ scipy.stats.norm.cdf(-0.15, MEANS, SCALES)
    assert abs((x0 < -0.15).mean() - share) < 4 * np.sqrt(share * (1 - share) / n)


# Guided data: normal with and without text, once of one mean, once of one scale.
CASES = {"one mean": ((0.2, 0.2), (0.3, 0.6)), "one scale": ((0.4, -0.1), (0.5, 0.5))}


def _guided_path(case, weight, noise, logsnr):
    """Closed forms of `dy / dk = sum_i w_i k (y - m_i) / (S_i**2 + k**2)`.

    y is z / alpha, k is sigma / alpha, and the weights are w and 1 - w: with one mean
    `y - m` goes as `prod_i (S_i**2 + k**2)**(w_i / 2)`, with one scale
    `y - sum_i w_i m_i` as `(S**2 + k**2)**(1 / 2)`. Returns the guided estimate at the
    last level.
    """
    means, scales = (np.array(a) for a in CASES[case])
    weights = np.array([weight, 1 - weight])
    k = np.exp(-logsnr[[0, -2]] / 2)
    alpha = 1 / np.sqrt(1 + k**2)
    growth = np.prod((scales[:, None] ** 2 + k**2) ** (weights[:, None] / 2), axis=0)
    middle = weights @ means
    y = middle + (noise / alpha[0] - middle) * growth[1] / growth[0]
    eps = sum(
        w * k[1] * (y - m) / (s**2 + k[1] ** 2)
        for w, m, s in zip(weights, means, scales)
    )
    return y - k[1] * eps


@pytest.mark.parametrize(
    ("case", "name"), [("one mean", "dpmpp"), ("one scale", "ddim")]
)
def test_guided_normal_data_have_a_closed_form_too(case, name):
    def data(z, logsnr, cond):
        with_text = expand(cond.mask.any(1), z)
        alpha, sigma = alpha_sigma(expand(logsnr, z))
        mean, scale = (jnp.where(with_text, a, b) for a, b in CASES[case])
        off = z - alpha * mean
        return mean + alpha * scale**2 / (alpha**2 * scale**2 + sigma**2) * off

    errors = []
    for steps in (64, 256):
        x0, noise, logsnr = _run(
            data, name=name, steps=steps, grid="logsnr", guidance=3.0
        )
        errors.append(np.abs(x0 - _guided_path(case, 3.0, noise, logsnr)).max())
    order = {"ddim": 1, "dpmpp": 2}[name]
    assert abs(np.log(errors[0] / errors[1]) / np.log(4) - order) < 0.15


def test_guidance_does_not_sample_the_tilted_density():
    """`p(x | text)**w p(x)**(1 - w)` of one mean has another width."""
    (_, _), (with_text, without) = CASES["one mean"]
    end = _guided_path("one mean", 3.0, np.array([1.0, 0.0]), np.array([-40, 40.0, 40]))
    np.testing.assert_allclose(end[0] - end[1], with_text**3 / without**2, rtol=1e-6)
    tilted = (3 / with_text**2 - 2 / without**2) ** -0.5
    assert tilted / (with_text**3 / without**2) > 2
