"""Guidance and thresholding against hand-worked and numpy's answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.batch import Cond
from imagen_jax.diffusion.guidance import (
    guided_x0,
    percentile_of_size,
    threshold,
)

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


def _weight(rows, weight):
    return None if weight is None else jnp.full(rows, weight)


@pytest.mark.parametrize(
    ("weight", "want"), [(None, 2.0), (1.0, 2.0), (0.0, 0.5), (3.0, 5.0)]
)
def test_equation_2(weight, want):
    """3 * 2 - 2 * 0.5 = 5, and no guidance at 1."""
    z = jnp.ones((2, 4, 4, 3))
    logsnr = jnp.zeros(2)  # alpha = sigma
    wants = {"x0": want, "eps": 2**0.5 - want, "v": 0.5**0.5 * (1 - want)}
    for prediction, x0 in wants.items():
        for batched in (True, False):
            have = guided_x0(
                Recorder(), z, logsnr, _cond(2), prediction, _weight(2, weight), batched
            )
            np.testing.assert_allclose(have, np.full(z.shape, x0), atol=20 * EPS)


def test_each_picture_has_its_own_weight():
    z = jnp.ones((3, 4, 4, 3))
    weight = jnp.array([1.0, 0.0, 3.0])
    have = guided_x0(Recorder(), z, jnp.zeros(3), _cond(3), "x0", weight)
    np.testing.assert_allclose(have[:, 0, 0, 0], [2.0, 0.5, 5.0], atol=20 * EPS)


@pytest.mark.parametrize(
    ("weight", "batched", "rows"),
    [(None, True, [3]), (1.5, True, [6]), (0.0, True, [6]), (1.5, False, [3, 3])],
)
def test_what_the_network_is_asked(weight, batched, rows):
    """Once on the batch; or also without its text, beside it or after it."""
    cond, seen = _cond(3), []

    def denoise(*args):
        seen.append(args)
        return args[0]

    z = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 3)))
    logsnr = jnp.array([-1.0, 0.0, 1.0])
    out = guided_x0(denoise, z, logsnr, cond, "x0", _weight(3, weight), batched)
    assert out.shape == z.shape
    assert [len(args[0]) for args in seen] == rows
    if rows == [6]:
        # Pairs of rows: with text, without.
        seen = [jax.tree.map(lambda a, i=i: a[i::2], seen[0]) for i in (0, 1)]
    for have_z, have_logsnr, have in seen:
        np.testing.assert_array_equal(have_z, z)
        np.testing.assert_array_equal(have_logsnr, logsnr)
        np.testing.assert_array_equal(have.lowres, cond.lowres)
        np.testing.assert_array_equal(have.aug_logsnr, cond.aug_logsnr)
        assert have.text.dtype == cond.text.dtype
        assert have.mask.dtype == cond.mask.dtype
    with_text = seen[0][2]
    np.testing.assert_array_equal(with_text.text, cond.text)
    np.testing.assert_array_equal(with_text.mask, cond.mask)
    for _, _, without in seen[1:]:
        assert not without.text.any() and not without.mask.any()


@pytest.mark.slow
@pytest.mark.parametrize("percentile", [0.0, 1.0, 50.0, 99.5, 100.0])
def test_percentile_is_numpys_image_by_image(percentile):
    """Of sizes far apart, repeated ones and zeros; of an even and an odd count."""
    rng = np.random.default_rng(0)
    scale = np.array([1e-30, 1, 7, 1e30], np.float32)[:, None, None, None]
    for shape in ((4, 16, 16, 3), (4, 5, 5, 3), (4, 1, 1, 1)):
        x = rng.normal(size=shape).astype(np.float32) * scale
        x[1] = np.round(x[1])
        x[2, :, :1] = np.float32(-0.0)
        have = percentile_of_size(jnp.asarray(x), percentile)
        want = np.percentile(np.abs(np.float64(x)).reshape(4, -1), percentile, axis=1)
        # The two values are exact; one product and two sums round.
        np.testing.assert_allclose(have, want, rtol=3 * EPS)


@pytest.mark.parametrize("percentile", [50.0, 99.5, 100.0])
def test_dynamic_threshold_is_the_papers_image_by_image(percentile):
    rng = np.random.default_rng(0)
    # From pictures well inside [-1, 1] to far out of it.
    scale = np.array([0.1, 0.5, 2, 10], np.float32)[:, None, None, None]
    x0 = rng.normal(size=(4, 16, 16, 3)).astype(np.float32) * scale
    have = threshold(x0, "dynamic", percentile)
    for one, picture in zip(np.asarray(have), x0.astype(np.float64)):
        s = max(1.0, np.percentile(np.abs(picture), percentile))
        want = np.clip(picture, -s, s) / s
        np.testing.assert_allclose(one, want, rtol=8 * EPS)


def test_a_hot_neighbour_changes_nothing():
    rng = np.random.default_rng(0)
    x0 = rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    x0[1] *= 100
    have = np.asarray(threshold(x0, "dynamic", 99.5))
    # In range already, so unchanged to the bit.
    np.testing.assert_array_equal(have[[0, 2]], x0[[0, 2]])
    np.testing.assert_array_equal(have[1:2], threshold(x0[1:2], "dynamic", 99.5))
    assert np.abs(have).max() <= 1


@pytest.mark.parametrize("ways", [(8, 1), (1, 8), (2, 4)])
def test_a_picture_is_thresholded_alike_on_any_mesh(ways):
    """Pictures, or rows of them, on eight devices: the same to the bit."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(0.1, 100, 8, dtype=np.float32)[:, None, None, None]
    x0 = rng.normal(size=(8, 16, 16, 3)).astype(np.float32) * scale
    run = jax.jit(threshold, static_argnums=(1, 2))
    want = np.asarray(run(x0, "dynamic", 99.5))
    mesh = jax.make_mesh(ways, ("data", "spatial"))
    split = jax.sharding.PartitionSpec("data", "spatial")
    placed = jax.device_put(x0, jax.sharding.NamedSharding(mesh, split))
    np.testing.assert_array_equal(run(placed, "dynamic", 99.5), want)
    alone = run(x0[5:6], "dynamic", 99.5)
    np.testing.assert_array_equal(alone, want[5:6])


def test_static_and_no_threshold():
    x0 = jnp.linspace(-3, 3, 48).reshape(1, 4, 4, 3)
    static = threshold(x0, "static", 99.5)
    np.testing.assert_array_equal(static, np.clip(x0, -1, 1))
    np.testing.assert_array_equal(threshold(x0, "none", 99.5), x0)
