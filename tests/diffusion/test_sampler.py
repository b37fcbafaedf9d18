"""What a sampler does at each step; where it leads is in test_sampler_convergence.py.

For `x0 ~ N(MEAN, SCALE**2)` the best denoiser is linear.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.batch import Cond
from imagen_jax.config import DiffusionConfig, SamplerConfig
from imagen_jax.diffusion.gaussian import alpha_sigma, expand
from imagen_jax.diffusion.sampler import guidance_weights, sample
from imagen_jax.diffusion.schedule import sampling_logsnr

MEAN, SCALE = 0.3, 0.5
# Most of the time goes to compiling.
QUICK = {"xla_backend_optimization_level": 0}


def _sample(denoise, rows, shape=(4, 4, 3), prediction="x0", seed=0, cond=None, **kw):
    keys = jax.random.split(jax.random.key(seed), rows)
    if cond is None:
        cond = Cond(text=jnp.ones((rows, 2, 4)), mask=jnp.ones((rows, 2), bool))
    sampler = SamplerConfig(**{"threshold": "none", **kw})
    run = functools.partial(
        sample,
        denoise,
        shape=shape,
        diffusion=DiffusionConfig(prediction=prediction),
        sampler=sampler,
        weights=_weights(sampler, rows),
    )
    return np.asarray(jax.jit(run, compiler_options=QUICK)(keys, cond)[0])


def _weights(sampler, rows):
    """The sampler's own, for each picture."""
    return jnp.tile(guidance_weights(sampler)[:, None], rows)


def _oracle(prediction, z, logsnr, cond):
    """The mean of x0, or what stands for it, given z."""
    alpha, sigma = alpha_sigma(expand(logsnr, z))
    variance = alpha**2 * SCALE**2 + sigma**2
    # From the mean of eps, so that no prediction divides by a tiny scale.
    eps = sigma * (z - alpha * MEAN) / variance
    x0 = MEAN + SCALE**2 * alpha * (z - alpha * MEAN) / variance
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[prediction]


def _moments(steps, gamma):
    """Mean and variance of the last estimate, in float64, step by step."""
    logsnr = np.float64(sampling_logsnr(DiffusionConfig(), SamplerConfig(steps=steps)))
    alpha, sigma = (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5
    mean, variance = 0.0, 1.0
    for t in range(steps):
        # The estimate is `gain z + shift`.
        gain = SCALE**2 * alpha[t] / (alpha[t] ** 2 * SCALE**2 + sigma[t] ** 2)
        shift = MEAN * (1 - gain * alpha[t])
        if t == steps - 1:
            return gain * mean + shift, gain**2 * variance
        s = t + 1
        decay = alpha[t] / alpha[s]
        spread = sigma[t] ** 2 - decay**2 * sigma[s] ** 2
        posterior = spread * sigma[s] ** 2 / sigma[t] ** 2
        of_z = decay * sigma[s] ** 2 / sigma[t] ** 2
        of_x0 = alpha[s] * spread / sigma[t] ** 2
        factor = of_z + of_x0 * gain
        mean = factor * mean + of_x0 * shift
        variance = factor**2 * variance + posterior ** (1 - gamma) * spread**gamma


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_ancestral_sampling_keeps_the_distribution(gamma):
    steps = 512
    denoise = functools.partial(_oracle, "x0")
    x0 = _sample(denoise, 4, (32, 32, 3), name="ddpm", steps=steps, gamma=gamma)
    mean, variance = _moments(steps, gamma)
    # Four standard errors of the moments of so many normal numbers.
    assert abs(x0.mean() - mean) < 4 * SCALE / np.sqrt(x0.size)
    assert abs(x0.var() / variance - 1) < 4 * np.sqrt(2 / x0.size)
    # The moments converge to those of the data, at order one.
    errors = [abs(_moments(n, gamma)[1] / SCALE**2 - 1) for n in (512, 1024, 2048)]
    assert errors[0] < 0.05
    assert errors[0] / errors[1] > 1.8 and errors[1] / errors[2] > 1.8
    assert abs(mean - MEAN) < 1e-3


def test_every_step_draws_its_own_noise():
    """One step's noise is neither another's nor the first noise."""
    seen = []

    def denoise(z, logsnr, cond):
        jax.debug.callback(lambda a: seen.append(np.array(a)), z, ordered=True)
        return jnp.zeros_like(z)

    _sample(denoise, 2, (16, 16, 3), name="ddpm", steps=8, gamma=1.0)
    assert len(seen) == 8
    logsnr = np.float64(sampling_logsnr(DiffusionConfig(), SamplerConfig(steps=8)))
    decay = [
        np.sqrt((1 + np.exp(-logsnr[i])) / (1 + np.exp(-logsnr[i + 1])))
        * np.exp(logsnr[i] - logsnr[i + 1])
        for i in range(7)
    ]
    noise = [seen[0]] + [seen[i + 1] - decay[i] * seen[i] for i in range(7)]
    rows = np.stack(noise).reshape(16, -1)  # both pictures, all steps
    correlation = np.corrcoef(rows) - np.eye(16)
    # 120 pairs of 768 numbers: five standard errors.
    assert np.abs(correlation).max() < 5 / np.sqrt(768)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (2.0, 6)])
def test_guidance_doubles_the_batch_only_when_it_guides(guidance, rows):
    seen = []

    def denoise(z, logsnr, cond):
        seen.append((len(z), len(logsnr), len(cond.mask)))
        return z

    _sample(denoise, 3, steps=4, guidance=guidance)
    assert set(seen) == {(rows, rows, rows)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule", "grid", "clip"),
    [
        ("ddpm", "cosine", "time", 20.0),
        ("ddpm", "linear", "time", 20.0),
        ("ddim", "cosine", "logsnr", 20.0),
        ("ddim", "linear", "logsnr", 4.0),
        ("dpmpp", "cosine", "time", 4.0),
        ("dpmpp", "linear", "logsnr", 20.0),
    ],
)
def test_nothing_is_lost_at_the_ends(name, schedule, grid, clip):
    """From log-SNR -20 to 20, and where the clip holds the schedule level."""
    x0 = _sample(
        lambda z, logsnr, cond: 0.5 * z,
        2,
        name=name,
        steps=12,
        schedule=schedule,
        grid=grid,
        logsnr_min=-clip,
        logsnr_max=clip,
        prediction="eps",
        threshold="dynamic",
    )
    eps = np.finfo(np.float32).eps  # of the division by its largest value
    assert np.isfinite(x0).all() and np.abs(x0).max() <= 1 + eps


def test_a_guidance_schedule_has_a_weight_for_each_step():
    """Steps of weight 1 run the network on the batch alone."""
    seen = []

    def denoise(z, logsnr, cond):
        rows = len(z)
        jax.debug.callback(lambda at: seen.append((rows, float(at))), logsnr[0])
        answer = jnp.where(cond.mask.any(1), 2.0, 0.5)
        return jnp.broadcast_to(expand(answer, z), z.shape)

    schedule = (3.0, 1.0, 1.0, 2.0)
    keys = jax.random.split(jax.random.key(0), 3)
    cond = Cond(text=jnp.ones((3, 2, 4)), mask=jnp.ones((3, 2), bool))
    cfg = SamplerConfig(
        name="ddim", steps=4, threshold="none", guidance_schedule=schedule
    )
    diffusion = DiffusionConfig(prediction="x0")
    weights = _weights(cfg, 3)
    _, estimates = sample(
        denoise, keys, cond, (2, 2, 3), diffusion, cfg, weights, range(4)
    )
    jax.effects_barrier()
    want = [2 * w + 0.5 * (1 - w) for w in schedule]
    np.testing.assert_allclose(estimates[:, 0, 0, 0, 0], want, rtol=1e-6)
    assert [rows for rows, _ in sorted(seen, key=lambda s: s[1])] == [6, 3, 3, 6]


def test_weights_of_each_picture_replace_the_samplers():
    def denoise(z, logsnr, cond):
        answer = jnp.where(cond.mask.any(1), 2.0, 0.5)
        return jnp.broadcast_to(expand(answer, z), z.shape)

    keys = jax.random.split(jax.random.key(0), 3)
    cond = Cond(text=jnp.ones((3, 2, 4)), mask=jnp.ones((3, 2), bool))
    cfg = SamplerConfig(name="ddim", steps=2, threshold="none", guidance=2.0)
    weights = jnp.array([[9.0, 9.0, 9.0], [1.0, 3.0, 0.0]])
    diffusion = DiffusionConfig(prediction="x0")
    x0, _ = sample(denoise, keys, cond, (2, 2, 3), diffusion, cfg, weights)
    np.testing.assert_allclose(x0[:, 0, 0, 0], [2.0, 5.0, 0.5], rtol=1e-6)


def _denoise_each(z, logsnr, cond):
    """Depends on everything that belongs to the picture, and on nothing else."""
    text = (cond.text * cond.mask[..., None]).mean((1, 2))
    near = jnp.roll(z, 1, axis=1) - 0.5 * jnp.roll(z, 1, axis=2)
    return jnp.tanh(near + expand(text + 0.1 * logsnr, z))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("ddpm", "dynamic"), ("ddim", "static"), ("dpmpp", "dynamic")]
)
def test_a_picture_is_its_own_in_any_batch(name, kind):
    text = jax.random.normal(jax.random.key(1), (8, 2, 4))
    mask = jnp.arange(2)[None] < jnp.array([2, 1, 0, 2, 2, 1, 2, 1])[:, None]
    keys = jax.random.split(jax.random.key(0), 8)
    cfg = SamplerConfig(name=name, steps=6, gamma=0.5, guidance=3.0, threshold=kind)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(keys, text, mask):
        cond = Cond(text=text, mask=mask)
        shape, weights = (4, 4, 3), _weights(cfg, len(keys))
        diffusion = DiffusionConfig()
        return sample(_denoise_each, keys, cond, shape, diffusion, cfg, weights)[0]

    pictures = np.asarray(run(keys, text, mask))
    # Another place and other neighbours in the same program: the same to the bit.
    order = np.array([5, 2, 7, 0, 0, 6, 1, 4])
    moved = run(keys[order], text[order], mask[order])
    np.testing.assert_array_equal(moved, pictures[order])
    alone = np.asarray(run(keys[3:4], text[3:4], mask[3:4]))
    # Another program rounds elsewhere; guidance and eps amplify by some hundreds at
    # the first, noisiest steps, and the picture forgets most of that.
    assert np.abs(alone - pictures[3:4]).max() < 1e-3
    assert len(np.unique(pictures.reshape(8, -1), axis=0)) == 8


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp"])
def test_the_guided_picture_is_what_is_thresholded(name):
    """3 * 1.5 - 2 * 2.5 = -0.5; clipping before guiding would give 3 - 2 = 1."""

    def denoise(z, logsnr, cond):
        answer = jnp.where(cond.mask.any(1), 1.5, 2.5)
        return jnp.broadcast_to(expand(answer, z), z.shape)

    for kind in ("static", "dynamic"):
        x0 = _sample(denoise, 2, name=name, steps=3, guidance=3.0, threshold=kind)
        np.testing.assert_array_equal(x0, np.full(x0.shape, -0.5))


def test_the_thresholded_picture_is_what_the_step_uses():
    """An estimate far out of range must not reach the next z."""
    seen = []

    def denoise(z, logsnr, cond):
        jax.debug.callback(lambda a: seen.append(np.array(a)), z, ordered=True)
        return jnp.full_like(z, 1000.0)

    x0 = _sample(denoise, 1, name="ddim", steps=4, threshold="static", guidance=1.0)
    np.testing.assert_array_equal(x0, np.ones_like(x0))
    # z is a mix of 1 and of the noise that leads from 1 to the first z.
    assert all(np.abs(z).max() <= 1 + 2 * np.abs(seen[0]).max() for z in seen)
