"""How sure a figure is, and what follows for a claim.

Figures are arrays `[S, N]` of S trainings, which differ in their seeds, and N captions,
the same for all of them; NaN where a caption does not ask.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

_DRAWS = 2000
_CONFIDENCE = 0.95
OUTCOMES = ("confirmed", "undecided", "refuted")


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What must hold of a weighted sum of figures, by its interval of 95 %.

    Without `within` it is confirmed if the whole interval lies above `above`, refuted
    if it lies below. With `within` it is confirmed if the whole interval lies in
    [-within, within], refuted if it lies outside. Else it is undecided.
    """

    says: str
    measure: str
    kind: str  # of captions; "" is all of them
    weights: tuple[tuple[str, float], ...]  # arms, and what they count
    above: float = 0.0
    within: float | None = None


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean of `[S, N]`, and its interval: a bootstrap over both at once.

    Trainings and captions are drawn with replacement, independently, as every training
    is asked all captions (the "pigeonhole bootstrap", Owen 2007, arXiv 0712.1111; it
    errs on the safe side). With one training the interval is over captions only.

    Returns:
      mean, lower end, upper end; percentiles 2.5 and 97.5.
    """
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    rng = np.random.default_rng(seed)
    rows, columns = (
        rng.multinomial(n, np.full(n, 1 / n), _DRAWS).astype(float)
        for n in values.shape
    )
    counts = ((rows @ known) * columns).sum(1)
    # A draw may hold no caption that asks.
    means = ((rows @ filled) * columns).sum(1)[counts > 0] / counts[counts > 0]
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(filled.sum() / known.sum()), float(low), float(high)


def contrast(
    arms: Mapping[str, np.ndarray], weights: Sequence[tuple[str, float]]
) -> np.ndarray:
    """The weighted sum of arms, training by training and caption by caption."""
    return sum(weight * arms[label] for label, weight in weights)


def outcome(low: float, high: float, criterion: Criterion) -> str:
    """One of `OUTCOMES`."""
    if criterion.within is None:
        holds, fails = low > criterion.above, high < criterion.above
    else:
        width = criterion.within
        holds = -width <= low and high <= width
        fails = low > width or high < -width
    return "confirmed" if holds else "refuted" if fails else "undecided"


def verdict(outcomes: Sequence[str]) -> str:
    """Of a claim: confirmed if all its criteria are, refuted if one is."""
    if "refuted" in outcomes:
        return "refuted"
    return "undecided" if "undecided" in outcomes else "confirmed"
