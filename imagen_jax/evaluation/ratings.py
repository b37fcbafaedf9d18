"""What people's ratings say: means, how sure they are, and whether raters agree."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.errors import UserError, printable

# Imagen, section 3: raters with fewer of the controls right are left out.
PASSING = 0.8
ALIGNMENT = {"yes": 100.0, "somewhat": 50.0, "no": 0.0}
_ROUNDS = 2_000
# Of the normal distribution: 95 % lie within, 80 % below.
_WITHIN_95, _BELOW_80 = 1.959964, 0.841621
_POINTS = 2


class Rating(NamedTuple):
    """One answer that counts."""

    question: str  # "quality" or "alignment"
    model: str  # whose picture is rated
    against: str  # whose it is preferred to, or ""
    category: str
    trial: str
    prompt: str
    rater: str
    value: float  # in [0, 100]


def alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha of ordinal values: 1 is agreement, 0 that of chance.

    `units` are the values that raters gave to each trial, in no order. None where there
    is nothing to compare: no trial with two values, or all values equal.

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part D.
    """
    values = np.unique(list(itertools.chain(*units)))
    counts = np.array([[list(u).count(v) for v in values] for u in units if len(u) > 1])
    if not counts.size:
        return None
    pairs = counts[:, :, None] * (counts[:, None, :] - np.eye(len(values)))
    met = (pairs / (counts.sum(1) - 1)[:, None, None]).sum(0)
    each = met.sum(0)
    # The distance of two values: how many ratings lie between, half of their own.
    below = np.cumsum(each) - each / 2
    distance = (below[:, None] - below) ** 2
    chance = each @ distance @ each / (each.sum() - 1)
    return float(1 - (met * distance).sum() / chance) if chance else None


def interval(ratings: Sequence[Rating], seed: int = 0) -> dict[str, float]:
    """The mean, and how sure it is, raters and prompts being samples of many.

    `naive` is half of the 95 % interval as if each rating were drawn by itself, which
    for a share is 1.96 sqrt(p (1 - p) / n). But ratings of one prompt are alike, and
    so are those of one rater: `low` to `high` is the interval of the mean when raters
    are drawn anew, and when prompts are, both changes added. As the noise of single
    ratings is in both, it is wide rather than narrow, by up to sqrt(2). `needed`, where
    it is in once, are the ratings, in the same proportion of raters and prompts, that
    find a mean 2 points off a given one in four of five studies.
    """
    values = np.array([r.value for r in ratings])
    rng = np.random.default_rng(seed)
    drawn = values.mean() + sum(
        _drawn([getattr(r, name) for r in ratings], values - values.mean(), rng)
        for name in ("rater", "prompt")
    )
    noise = values.var() / len(values)
    variance = max(drawn.var() - noise, noise)
    low, high = np.clip(np.percentile(drawn, [2.5, 97.5]), 0, 100)
    times = (_WITHIN_95 + _BELOW_80) / _POINTS
    return {
        "mean": float(values.mean()),
        "naive": float(_WITHIN_95 * np.sqrt(noise)),
        "low": float(low),
        "high": float(high),
        "needed": math.ceil(len(values) * variance * times**2),
    }


def _drawn(
    clusters: Sequence[str], values: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Means of the values when as many clusters are drawn anew, many times over."""
    _, ids = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(ids, values), np.bincount(ids)
    times = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), _ROUNDS)
    return (times @ sums) / (times @ sizes)


def read_answers(
    key: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """The answers of each rater by trial; of several to one the last is taken.

    Raises:
      UserError: for a file that holds no answers to this study.
    """
    found = {}
    for name, content in files.items():
        try:
            if content["study"] != key["study"]:
                raise ValueError("they are to another one")
            own = found.setdefault(str(content["rater"]), {})
            for trial, answer in content["answers"].items():
                asked = key["trials"][trial]
                is_choice = asked["question"] == "quality"
                if answer not in (asked["pictures"] if is_choice else ALIGNMENT):
                    raise ValueError(f"{answer!r:.99} is no answer to {trial}")
                own[trial] = answer
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{name} holds no answers to this study ({type(error).__name__}: "
                f"{error}): leave it out"
            ) from None
    return found


def _rating(rater: str, name: str, trial: Mapping[str, Any], answer: str) -> Rating:
    """What an answer says of a model, or of the first of two."""
    if trial["question"] == "alignment":
        (model,) = trial["pictures"].values()
        against, value = "", ALIGNMENT[answer]
    else:
        model, against = sorted(trial["pictures"].values())
        value = 100.0 * (trial["pictures"][answer] == model)
    about = trial["question"], model, against, trial["category"]
    return Rating(*about, name, trial["caption"], rater, value)


def score(key: Mapping[str, Any], answers: Mapping[str, Mapping[str, str]]) -> dict:
    """The report: raters with their share of right controls, and a row per category.

    Args:
      key: what `study.build` keeps back.
      answers: of each rater by trial.

    Raises:
      UserError: when no rater passes.
    """
    trials = key["trials"]
    raters, ratings = {}, []
    for rater, own in answers.items():
        controls = [own[t] == trials[t]["right"] for t in own if trials[t]["right"]]
        share = sum(controls) / len(controls) if controls else 0.0
        raters[rater] = {
            "answers": len(own),
            "controls": len(controls),
            "right": share,
            "kept": share >= PASSING,
        }
        if share >= PASSING:
            for trial, answer in own.items():
                if not trials[trial]["right"]:
                    ratings.append(_rating(rater, trial, trials[trial], answer))
    if not ratings:
        raise UserError(
            f"none of {len(raters)} raters has {PASSING:.0%} of the controls right and "
            "another answer"
        )
    groups = {}
    for one in ratings:
        for category in {"", one.category}:
            about = one.question, one.model, one.against, category
            groups.setdefault(about, []).append(one)
    return {"raters": raters, "rows": [_row(*g) for g in sorted(groups.items())]}


def _row(about: tuple[str, ...], ratings: Sequence[Rating]) -> dict[str, Any]:
    units = {}
    for one in ratings:
        units.setdefault(one.trial, []).append(one.value)
    return {
        **dict(zip(("question", "model", "against", "category"), about)),
        "ratings": len(ratings),
        "raters": len({one.rater for one in ratings}),
        "prompts": len({one.prompt for one in ratings}),
        **interval(ratings),
        "alpha": alpha(list(units.values())),
    }


def table(report: Mapping[str, Any]) -> str:
    """A report as lines of text."""
    dropped = [name for name, one in report["raters"].items() if not one["kept"]]
    lines = [
        f"{len(report['raters'])} raters, {len(dropped)} left out for having under "
        f"{PASSING:.0%} of the controls right: {', '.join(dropped) or 'none'}",
        f"{'question, model, category':44} ratings raters prompts   mean  naive  "
        "bootstrap 95 %  alpha   needed",
    ]
    for row in report["rows"]:
        against = f" over {row['against']}" if row["against"] else ""
        name = f"{row['question']}, {row['model']}{against}, {row['category'] or 'all'}"
        agreement = "-" if row["alpha"] is None else f"{row['alpha']:.2f}"
        lines.append(
            f"{name:44} {row['ratings']:7,} {row['raters']:6,} {row['prompts']:7,} "
            f"{row['mean']:6.1f} {row['naive']:6.2f}  {row['low']:6.1f} to "
            f"{row['high']:5.1f} {agreement:>6} {row['needed']:8,}"
        )
    lines.append(f"needed: ratings for a difference of {_POINTS} points")
    return "\n".join(map(printable, lines))
