"""The Gaussian forward process, its inversion, and the steps of samplers.

| symbol   | meaning                                                             |
|----------|---------------------------------------------------------------------|
| `x0`     | the image, `[B, H, W, C]`, in [-1, 1]                               |
| `eps`    | standard normal noise of the same shape                             |
| `z`      | the noised image, `alpha x0 + sigma eps`                            |
| `logsnr` | `log(alpha**2 / sigma**2)`, `[B]`; `_t` now, `_s` next (less noise) |
| `v`      | `alpha eps - sigma x0` (arXiv 2202.00512 App. D)                    |
"""

import jax
import jax.numpy as jnp


def expand(values: jax.Array, like: jax.Array) -> jax.Array:
    """`[B]` to `[B, 1, 1, 1]`, to be multiplied with `like`, `[B, H, W, C]`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def alpha_sigma(logsnr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales of signal and noise at `logsnr`; their squares add up to 1."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def diffuse(x0: jax.Array, logsnr: jax.Array, eps: jax.Array) -> jax.Array:
    """The sample of `q(z | x0)` that the given noise makes (paper Sec. 2.1)."""
    alpha, sigma = alpha_sigma(expand(logsnr, x0))
    return alpha * x0 + sigma * eps


def prediction_target(
    x0: jax.Array, eps: jax.Array, logsnr: jax.Array, prediction: str
) -> jax.Array:
    """The perfect output of a network with `prediction` "eps", "x0" or "v"."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    alpha, sigma = alpha_sigma(expand(logsnr, x0))
    return alpha * eps - sigma * x0


def predicted_x0(
    output: jax.Array, z: jax.Array, logsnr: jax.Array, prediction: str
) -> jax.Array:
    """The estimate of `x0` that follows from a network's output for `z`."""
    if prediction == "x0":
        return output
    alpha, sigma = alpha_sigma(expand(logsnr, z))
    if prediction == "v":
        return alpha * z - sigma * output
    # 1 / alpha and sigma / alpha, from the log-SNR to avoid quotients of tiny numbers.
    logsnr = expand(logsnr, z)
    return jnp.sqrt(1 + jnp.exp(-logsnr)) * z - jnp.exp(-logsnr / 2) * output


def ddim_step(
    x0: jax.Array, z: jax.Array, logsnr_t: jax.Array, logsnr_s: jax.Array
) -> jax.Array:
    """One deterministic step from noise level t to s (paper Eq. 5).

    As in the steps below, `x0` is the estimate at t; the log-SNRs are scalars.
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    return alpha_s * x0 + sigma_s / sigma_t * (z - alpha_t * x0)


def dpmpp_step(
    x0: jax.Array,
    x0_before: jax.Array,
    z: jax.Array,
    logsnr_before: jax.Array,
    logsnr_t: jax.Array,
    logsnr_s: jax.Array,
) -> jax.Array:
    """One step of DPM-Solver++(2M) from noise level t to s (arXiv 2211.01095 Alg. 2).

    It is of second order: the estimate is extrapolated from the last two. Where there
    is none before, which `logsnr_before == logsnr_t` says, it is of first order.
    """
    step, step_before = logsnr_s - logsnr_t, logsnr_t - logsnr_before
    ratio = jnp.where(step_before > 0, step / jnp.maximum(step_before, 1e-6), 0.0)
    extrapolated = x0 + ratio / 2 * (x0 - x0_before)
    return ddim_step(extrapolated, z, logsnr_t, logsnr_s)


def ancestral_step(
    x0: jax.Array,
    z: jax.Array,
    logsnr_t: jax.Array,
    logsnr_s: jax.Array,
    gamma: float,
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of `p(z_s | z_t)` (paper Eq. 6).

    In [0, 1], `gamma` interpolates, in the logarithm, between the variance of
    `q(z_s | z_t, x0)` and that of `q(z_t | z_s)`.
    """
    alpha_t, _ = alpha_sigma(logsnr_t)
    alpha_s, _ = alpha_sigma(logsnr_s)
    ratio = jnp.exp(logsnr_t - logsnr_s)
    rest = -jnp.expm1(logsnr_t - logsnr_s)
    mean = ratio * alpha_s / alpha_t * z + rest * alpha_s * x0
    log_variance = (1 - gamma) * jax.nn.log_sigmoid(
        -logsnr_s
    ) + gamma * jax.nn.log_sigmoid(-logsnr_t)
    return mean, jnp.sqrt(rest * jnp.exp(log_variance))
