"""Guidance and thresholding against hand-worked and numpy's answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.batch import Cond
from imagen_jax.diffusion.guidance import guided_x0, threshold

EPS = np.finfo(np.float32).eps


def _cond(rows):
    rng = np.random.default_rng(0)
    return Cond(
        text=jnp.asarray(rng.normal(size=(rows, 5, 4)), jnp.bfloat16),
        mask=jnp.arange(5)[None] < jnp.arange(1, rows + 1)[:, None],
        lowres=jnp.asarray(rng.normal(size=(rows, 2, 2, 3)), jnp.float32),
        aug_logsnr=jnp.arange(rows, dtype=jnp.float32),
    )


class Recorder:
    """Answers 2 for rows with text and 0.5 for rows without; keeps what it saw."""

    def __call__(self, z, logsnr, cond):
        self.z, self.logsnr, self.cond = z, logsnr, cond
        answer = jnp.where(cond.mask.any(1), 2.0, 0.5)
        return jnp.broadcast_to(answer[:, None, None, None], z.shape)


@pytest.mark.parametrize(("weight", "want"), [(1, 2.0), (0, 0.5), (3, 5.0)])
def test_equation_2(weight, want):
    """3 * 2 - 2 * 0.5 = 5, and no guidance at 1."""
    z = jnp.ones((2, 4, 4, 3))
    logsnr = jnp.zeros(2)  # alpha = sigma
    wants = {"x0": want, "eps": 2**0.5 - want, "v": 0.5**0.5 * (1 - want)}
    for prediction, x0 in wants.items():
        have = guided_x0(Recorder(), z, logsnr, _cond(2), prediction, weight)
        np.testing.assert_allclose(have, np.full(z.shape, x0), atol=20 * EPS)


@pytest.mark.parametrize("weight", [1.0, 1.5, 0.0])
def test_what_the_network_is_asked(weight):
    """Once on the batch, or on the batch and again without its text."""
    cond, denoise = _cond(3), Recorder()
    z = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 3)))
    logsnr = jnp.array([-1.0, 0.0, 1.0])
    out = guided_x0(denoise, z, logsnr, cond, "x0", weight)
    assert out.shape == z.shape
    times = 1 if weight == 1 else 2
    for name, have, want in [
        ("z", denoise.z, z),
        ("logsnr", denoise.logsnr, logsnr),
        ("lowres", denoise.cond.lowres, cond.lowres),
        ("aug_logsnr", denoise.cond.aug_logsnr, cond.aug_logsnr),
    ]:
        np.testing.assert_array_equal(have, np.concatenate([want] * times), name)
    text, mask = denoise.cond.text, denoise.cond.mask
    assert text.dtype == cond.text.dtype
    np.testing.assert_array_equal(text[:3], cond.text)
    np.testing.assert_array_equal(mask[:3], cond.mask)
    assert not text[3:].any() and not mask[3:].any()
    assert len(text) == len(mask) == 3 * times


@pytest.mark.parametrize("percentile", [50.0, 99.5, 100.0])
def test_dynamic_threshold_is_numpys_image_by_image(percentile):
    rng = np.random.default_rng(0)
    # From pictures well inside [-1, 1] to far out of it.
    scale = np.array([0.1, 0.5, 2, 10], np.float32)[:, None, None, None]
    x0 = rng.normal(size=(4, 16, 16, 3)).astype(np.float32) * scale
    have = threshold(x0, "dynamic", percentile)
    for one, picture in zip(np.asarray(have), x0.astype(np.float64)):
        s = max(1.0, np.percentile(np.abs(picture), percentile))
        # Its place among n values is a float32: off by n EPS of the gap around it.
        gap = np.diff(np.sort(np.abs(picture), axis=None)).max()
        rtol = 8 * EPS + picture.size * EPS * gap / s
        np.testing.assert_allclose(one, np.clip(picture, -s, s) / s, rtol=rtol)


def test_a_hot_neighbour_changes_nothing():
    rng = np.random.default_rng(0)
    x0 = rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    x0[1] *= 100
    have = np.asarray(threshold(x0, "dynamic", 99.5))
    # In range already, so unchanged to the bit.
    np.testing.assert_array_equal(have[[0, 2]], x0[[0, 2]])
    np.testing.assert_array_equal(have[1:2], threshold(x0[1:2], "dynamic", 99.5))
    assert np.abs(have).max() <= 1


def test_static_and_no_threshold():
    x0 = jnp.linspace(-3, 3, 48).reshape(1, 4, 4, 3)
    static = threshold(x0, "static", 99.5)
    np.testing.assert_array_equal(static, np.clip(x0, -1, 1))
    np.testing.assert_array_equal(threshold(x0, "none", 99.5), x0)
