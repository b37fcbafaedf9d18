"""Distances of features: closed forms, scipy's root, torch-fidelity's figures.

The recorded figures are made by tests/references/make_fidelity.py.
"""

import functools
import itertools
import json
import pathlib

import numpy as np
import pytest
import scipy.linalg

from imagen_jax.errors import UserError
from imagen_jax.evaluation import distances
from imagen_jax.evaluation.distances import Statistics, frechet, merge, statistics

RECORD = np.load(pathlib.Path(__file__).parents[1] / "references" / "fidelity.npz")


def drawn(count, width, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width))


def streamed(features, *ends):
    parts = np.split(features, ends)
    return functools.reduce(merge, map(statistics, parts))


@pytest.mark.parametrize("ends", [(), (1,), (1, 2, 3), (64, 128), (300,)])
def test_statistics_of_batches_are_those_of_all(ends):
    features = drawn(301, 7) @ drawn(7, 7, 1) + 3
    found = streamed(features, *ends)
    assert found.n == 301
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-13)
    covariance = np.cov(features, rowvar=False)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-11, atol=1e-13)


def test_statistics_of_float32_are_summed_in_float64():
    """Far from zero, where sums of squares in float32 would have no digit left."""
    features = (drawn(4_000, 3) + 1e4).astype(np.float32)
    found = streamed(features, *range(64, 4_000, 64))
    exact = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-9, atol=1e-9)


def test_gaussians_with_equal_axes_have_a_closed_form():
    """Features whose sample moments are exactly what the formula is given."""
    raw = drawn(500, 6)
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    axes = np.linalg.qr(drawn(6, 6, 2))[0]
    a, b = np.array([4, 1, 0.25, 9, 1e-6, 2.0]), np.array([1, 1, 4, 16, 1e-2, 0.0])
    step = np.array([1, 0, -2, 0, 0.5, 0])
    left = statistics(white * np.sqrt(a) @ axes)
    right = statistics((white * np.sqrt(b) + step) @ axes)
    want = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2) + step @ step
    assert frechet(left, right) == pytest.approx(want, rel=1e-12)


def test_other_gaussians_agree_with_scipys_root():
    left, right = (
        streamed(drawn(200, 12, s) @ drawn(12, 12, s + 2), 99) for s in (0, 1)
    )
    root = scipy.linalg.sqrtm(left.covariance @ right.covariance).real
    trace = np.trace(left.covariance + right.covariance - 2 * root)
    want = np.sum((left.mean - right.mean) ** 2) + trace
    assert frechet(left, right) == pytest.approx(want, rel=1e-9)
    assert frechet(right, left) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("count", [20, 400])
def test_equal_features_have_no_distance(count):
    """Of a covariance without an inverse, too, and in another order."""
    features = np.abs(drawn(count, 64)) * 10
    left, right = streamed(features, 7), streamed(features[::-1], 3, 11)
    assert abs(frechet(left, right)) < 1e-11 * np.trace(left.covariance)


def test_the_distance_is_torch_fidelitys():
    samples, reference = RECORD["samples"], RECORD["reference"]
    found = frechet(streamed(samples, 64), streamed(reference, 64))
    assert found == pytest.approx(float(RECORD["fid"]), rel=1e-6)


def test_kernel_and_neighbours_are_torch_fidelitys():
    pytest.importorskip("torch_fidelity", reason="needs the extra `eval`")
    found = distances.by_torch_fidelity(RECORD["samples"], RECORD["reference"])
    assert found["KID"] == pytest.approx(float(RECORD["kid"]), rel=1e-4)
    assert found["precision"] == pytest.approx(float(RECORD["precision"]))
    assert found["recall"] == pytest.approx(float(RECORD["recall"]))


def test_statistics_are_stored_and_read(tmp_path):
    path, features = str(tmp_path / "a.npz"), drawn(30, 5)
    about = {"reference": "ab", "weights": "cd", "size": 64}
    kept = Statistics(*vars(statistics(features)).values())
    kept = Statistics(30, kept.mean, kept.covariance, about, features)
    distances.save_statistics(path, kept)
    found = distances.read_statistics(path, 5, {"weights": "cd", "size": 64})
    assert (found.n, found.about, found.features) == (30, about, None)
    assert frechet(found, kept) == pytest.approx(0, abs=1e-12)
    with np.load(path) as file:  # as others would read it
        np.testing.assert_array_equal(file["sigma"], kept.covariance)


def test_statistics_of_others_tell_nothing(tmp_path):
    path, own = str(tmp_path / "fid_stats_a.npz"), statistics(drawn(30, 5))
    np.savez(path, mu=own.mean, sigma=own.covariance)
    found = distances.read_statistics(path, 5, {"weights": "cd"})
    assert (found.n, found.about) == (0, {})
    np.testing.assert_array_equal(found.covariance, own.covariance)


MU, SIGMA = np.zeros(5), np.eye(5)
ABOUT = np.array(json.dumps({"n": 9, "weights": "other"}))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU}, "sigma"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "mu is <f8"),
        ({"mu": MU, "sigma": SIGMA * np.nan}, "not all are finite"),
        ({"mu": MU, "sigma": SIGMA, "about": ABOUT}, "with weights other, not cd"),
        ({"mu": MU, "sigma": SIGMA, "about": np.array("[")}, "is not statistics of 5"),
    ],
)
def test_other_statistics_are_refused(tmp_path, arrays, message):
    path = str(tmp_path / "a.npz")
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as raised:
        distances.read_statistics(path, 5, {"weights": "cd"})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [None, b"", b"PK\x03\x04", bytes(1000)])
def test_a_file_that_holds_no_statistics_is_refused(tmp_path, data):
    path = tmp_path / "a.npz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match="is not statistics of 5 features"):
        distances.read_statistics(str(path), 5, {})


def test_recorded_features_are_not_all_alike():
    """Else equal figures would say nothing."""
    figures = [float(RECORD[name]) for name in ("precision", "recall")]
    assert all(0.1 < f < 0.9 for f in figures)
    assert all(a != b for a, b in itertools.pairwise(figures))
    assert float(RECORD["fid"]) > 0.1
