"""Intervals against scipy's and against closed forms; what follows from them."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.claims import intervals
from benchmarks.claims.intervals import Criterion


def test_of_one_training_it_is_scipys_bootstrap_over_captions():
    values = np.random.default_rng(0).gamma(2.0, size=200)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    mean, low, high = intervals.interval(values[None])
    assert mean == pytest.approx(values.mean())
    # The ends of 2,000 draws are themselves uncertain, by 4 % of the width here.
    width = theirs.high - theirs.low
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.1 * width)


def test_trainings_and_captions_both_count():
    """Of sums of a value by training and one by caption the variances add up."""
    rng = np.random.default_rng(1)
    rows, columns = rng.normal(size=(40, 1)), rng.normal(size=(1, 60))
    _, low, high = intervals.interval(rows + columns)
    expected = (rows.var() / 40 + columns.var() / 60) ** 0.5
    assert (high - low) / (2 * 1.96) == pytest.approx(expected, rel=0.08)


def test_captions_that_do_not_ask_are_left_out():
    values = np.array([[1.0, np.nan, 0.0, np.nan], [1.0, np.nan, 1.0, np.nan]])
    mean, low, high = intervals.interval(values)
    assert mean == 0.75 and 0 <= low <= mean <= high <= 1
    assert intervals.interval(np.array([[3.0]])) == (3.0, 3.0, 3.0)


def test_a_contrast_is_made_caption_by_caption():
    """What is common to both arms is in no interval."""
    common = np.random.default_rng(2).normal(size=(3, 50))
    arms = {"a": common + 0.5, "b": common, "c": 2 * common}
    found = intervals.contrast(arms, (("a", 1.0), ("b", -1.0)))
    assert intervals.interval(found) == pytest.approx((0.5, 0.5, 0.5))
    found = intervals.contrast(arms, (("c", 1.0), ("b", -2.0)))
    assert np.abs(found).max() < 1e-12


@pytest.mark.parametrize(
    ("low", "high", "bounds", "expected"),
    [
        (0.1, 0.3, {}, "confirmed"),
        (-0.1, 0.3, {}, "undecided"),
        (-0.3, -0.1, {}, "refuted"),
        (0.1, 0.3, {"above": 0.2}, "undecided"),
        (0.1, 0.15, {"above": 0.2}, "refuted"),
        (-0.02, 0.01, {"above": -0.03}, "confirmed"),
        (-0.05, 0.04, {"within": 0.1}, "confirmed"),
        (-0.05, 0.14, {"within": 0.1}, "undecided"),
        (0.11, 0.14, {"within": 0.1}, "refuted"),
        (-0.3, -0.11, {"within": 0.1}, "refuted"),
    ],
)
def test_outcomes(low, high, bounds, expected):
    criterion = Criterion("", "right", "", (), **bounds)
    assert intervals.outcome(low, high, criterion) == expected


def test_a_claim_needs_all_of_its_criteria():
    assert intervals.verdict(["confirmed", "confirmed"]) == "confirmed"
    assert intervals.verdict(["confirmed", "undecided"]) == "undecided"
    assert intervals.verdict(["confirmed", "undecided", "refuted"]) == "refuted"
