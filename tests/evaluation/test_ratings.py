"""Ratings: agreement, intervals that hold what they say, and who counts."""

import itertools
import statistics

import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.evaluation.ratings import (
    Rating,
    alpha,
    interval,
    read_answers,
    score,
    table,
)

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part C: what four
# observers say of twelve units.
OBSERVED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
# Three coders of fifteen units, in Wikipedia's article on the coefficient.
CODED = """
. . . . . 3 4 1 2 1 1 3 3 . 3
1 . 2 1 3 3 4 3 . . . . . . .
. . 2 1 3 4 4 . 2 1 1 3 3 . 4
"""


def units(text):
    rows = [line.split() for line in text.strip().splitlines()]
    return [[float(v) for v in column if v != "."] for column in zip(*rows)]


@pytest.mark.parametrize(("text", "want"), [(OBSERVED, 0.815), (CODED, 0.807)])
def test_ordinal_alpha_is_the_published_one(text, want):
    assert alpha(units(text)) == pytest.approx(want, abs=5e-4)


def test_of_two_values_it_is_the_nominal_one():
    own = [[float(v > 2.5) for v in unit] for unit in units(OBSERVED)]
    assert alpha(own) == pytest.approx(by_pairs(own, lambda a, b, _: a != b))


def by_pairs(units, squared):
    """Alpha as all pairs of values have it, one by one."""
    units = [unit for unit in units if len(unit) > 1]
    every = [v for unit in units for v in unit]
    met = sum(
        squared(a, b, every) / (len(unit) - 1)
        for unit in units
        for a, b in itertools.permutations(unit, 2)
    )
    chance = sum(squared(a, b, every) for a, b in itertools.permutations(every, 2))
    return 1 - met / len(every) / (chance / len(every) / (len(every) - 1))


def ordinal(a, b, every):
    """The published difference: the ratings from one value to the other."""
    low, high = sorted((a, b))
    between = sum(low <= v <= high for v in every)
    return (between - (every.count(a) + every.count(b)) / 2) ** 2 if a != b else 0


@pytest.mark.parametrize("seed", range(10))
def test_alpha_is_that_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 6, 30)
    own = [list(rng.choice([0.0, 50.0, 100.0], n, p=[0.2, 0.2, 0.6])) for n in sizes]
    assert alpha(own) == pytest.approx(by_pairs(own, ordinal))


def test_alpha_of_agreement_and_of_nothing():
    assert alpha([[0, 0], [100, 100, 100], [50]]) == 1
    assert alpha([[0, 100], [100, 0]]) < 0
    assert alpha([]) is alpha([[1], [2]]) is alpha([[1, 1], [1, 1]]) is None


def ratings(values, prompts, raters):
    about = "quality", "a", "b", ""
    return [
        Rating(*about, str(p), str(p), str(r), v)
        for v, p, r in zip(values, prompts, raters)
    ]


def test_the_naive_interval_is_the_papers():
    """1.96 sqrt(p (1 - p) / n), and for three choices that of their variance."""
    found = interval(ratings([100] * 395 + [0] * 605, range(1000), range(1000)))
    assert found["mean"] == pytest.approx(39.5)
    want = 100 * 1.96 * (0.395 * 0.605 / 1000) ** 0.5
    assert found["naive"] == pytest.approx(want, rel=1e-4)
    values = [100, 100, 50, 0]
    found = interval(ratings(values, range(4), range(4)))
    want = 1.96 * statistics.pstdev(values) / 2
    assert found["naive"] == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_the_needed_ratings_are_the_textbooks():
    """Of fair independent ones (1.96 + 0.84)^2 p (1 - p) / 0.02^2 = 4,906."""
    n = 4000
    found = interval(ratings([0, 100] * (n // 2), range(n), range(n)))
    # A variance by 2,000 draws is right to 3 % (one deviation); twice that is taken.
    assert found["needed"] == pytest.approx(4906, rel=0.2)
    # Raters of ten equal answers count as one.
    times = interval(
        ratings([0, 100] * (n // 2), range(n), [i % 400 for i in range(n)])
    )
    assert times["needed"] > 8 * found["needed"]


def test_one_cluster_has_no_spread():
    """Then the interval is that over the others alone."""
    values = np.random.default_rng(0).choice([0.0, 100.0], 400)
    found = interval(ratings(values, range(400), [0] * 400))
    half = (found["high"] - found["low"]) / 2
    assert half == pytest.approx(found["naive"], rel=0.1)


def study(prompts, controls=10):
    """The key of a study of "a" beside "b"."""
    about = {"question": "quality", "caption": "", "category": "", "right": ""}
    trials = {
        f"t{i}": about
        | {"caption": f"prompt {i}", "category": "xy"[i % 2]}
        | {"pictures": {f"a{i}": "a", f"b{i}": "b"}}
        for i in range(prompts)
    }
    pictures = {"good": "clear", "bad": "spoiled"}
    for i in range(controls):
        trials[f"c{i}"] = about | {"pictures": pictures, "right": "good"}
    return {"study": "s", "trials": trials}


def simulated(seed, prompts=40, raters=20, careless=5, preference=0.6):
    """Raters of whom some answer as a coin falls; prompts and raters differ."""
    rng, key = np.random.default_rng(seed), study(prompts)
    by_prompt, by_rater = rng.normal(0, 0.15, prompts), rng.normal(0, 0.05, raters)
    answers = {}
    for r in range(raters):
        is_careless = r < careless
        own = answers[f"rater {r}"] = {}
        for i in rng.choice(prompts, prompts // 2, replace=False):
            share = preference + by_prompt[i] + by_rater[r]
            share = 0.5 if is_careless else np.clip(share, 0, 1)
            own[f"t{i}"] = f"{'a' if rng.random() < share else 'b'}{i}"
        for i in range(10):
            is_right = rng.random() < (0.5 if is_careless else 0.97)
            own[f"c{i}"] = "good" if is_right else "bad"
    return key, answers


@pytest.mark.slow
def test_the_interval_covers_a_known_preference():
    """Raters prefer "a" in 60 of 100; a quarter of those who answer do not look."""
    covered = naive = careless = careful = 0
    for seed in range(100):
        report = score(*simulated(seed))
        row = report["rows"][0]
        assert (row["model"], row["against"], row["category"]) == ("a", "b", "")
        covered += row["low"] <= 60 <= row["high"]
        naive += abs(row["mean"] - 60) <= row["naive"]
        kept = [one["kept"] for one in report["raters"].values()]
        careless += sum(kept[:5])
        careful += sum(kept[5:])
    # Not so the naive interval, which is why there is another.
    assert naive < 90 <= covered
    # Of ten coins 8 or more are right in 5.5 % of all cases.
    assert careless / 500 == pytest.approx(0.055, abs=0.04) and careful > 1480


def test_a_report_by_hand():
    """Two raters count, a third has 3 of 4 controls right, a fourth saw none."""
    key = study(4, controls=4)
    about = {"caption": "prompt 0", "category": "x", "right": ""}
    for i, model in enumerate(["a", "b", "reference"]):
        trial = about | {"question": "alignment", "pictures": {f"p{i}": model}}
        key["trials"][f"q{i}"] = trial
    right = {f"c{i}": "good" for i in range(4)}
    answers = {
        "one": right | {"t0": "a0", "t1": "b1", "t2": "a2"},
        "two": right | {"t0": "a0", "t1": "a1", "t3": "b3"},
        "three": right | {"c3": "bad", "t0": "b0"},
        "four": {"t0": "b0"},
    }
    answers["one"] |= {"q0": "yes", "q1": "no", "q2": "yes"}
    answers["two"] |= {"q0": "somewhat", "q1": "no"}
    report = score(key, answers)
    assert {name: one["right"] for name, one in report["raters"].items()} == {
        "one": 1.0,
        "two": 1.0,
        "three": 0.75,
        "four": 0.0,
    }
    found = {
        tuple(row[n] for n in ("question", "model", "against", "category")): row
        for row in report["rows"]
    }
    assert {name: (row["ratings"], row["mean"]) for name, row in found.items()} == {
        ("quality", "a", "b", ""): (6, 100 * 4 / 6),
        ("quality", "a", "b", "x"): (3, 100.0),  # prompts 0 and 2
        ("quality", "a", "b", "y"): (3, 100 / 3),
        ("alignment", "a", "", ""): (2, 75.0),
        ("alignment", "a", "", "x"): (2, 75.0),
        ("alignment", "b", "", ""): (2, 0.0),
        ("alignment", "b", "", "x"): (2, 0.0),
        ("alignment", "reference", "", ""): (1, 100.0),
        ("alignment", "reference", "", "x"): (1, 100.0),
    }
    whole = found["quality", "a", "b", ""]
    assert (whole["raters"], whole["prompts"]) == (2, 4)
    assert whole["alpha"] == pytest.approx(
        by_pairs([[1, 1], [0, 1], [1], [0]], ordinal)
    )
    text = table(report).splitlines()
    assert "4 raters, 2 left out" in text[0] and "three, four" in text[0]
    assert any("quality, a over b, all" in line and " 66.7 " in line for line in text)


def test_nobody_passes():
    with pytest.raises(UserError, match="none of 1 raters has 80% of the controls"):
        score(study(2), {"one": {"t0": "a0"}})


def test_answers_of_one_rater_are_put_together():
    """Those of two downloads; the second has the later answer."""
    first = {"study": "s", "rater": "r", "answers": {"t0": "a0", "t1": "a1"}}
    later = {"study": "s", "rater": "r", "answers": {"t1": "b1"}}
    found = read_answers(study(2), {"1.json": first, "2.json": later})
    assert found == {"r": {"t0": "a0", "t1": "b1"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "other"}, "x.json holds no answers to this study .*another one"),
        ({"answers": {"t9": "a0"}}, "KeyError: 't9'"),
        ({"answers": {"t0": "a1"}}, "'a1' is no answer to t0"),
        ({"answers": {"t0": "yes"}}, "'yes' is no answer to t0"),
        ({"answers": {"t0": ["a0"]}}, "x.json holds no answers"),
        ({"answers": {"t0": None}}, "None is no answer"),
        ({"answers": ["t0"]}, "AttributeError"),
    ],
)
def test_answers_to_something_else_are_one_line(changes, message):
    given = {"study": "s", "rater": "r", "answers": {"t0": "a0"}} | changes
    with pytest.raises(UserError, match=message) as raised:
        read_answers(study(2), {"x.json": given})
    assert "\n" not in str(raised.value)
