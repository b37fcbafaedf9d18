"""The trade-off over guidance: how samples look against how they fit their captions."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.files import read_json

_ALIGNMENT, _DISTANCE = ("CLIP score (", "judged "), ("FID", "FD")
_RESULTS_BYTES = 2**28


def read_results(path: str) -> list[dict[str, Any]]:
    """The results in a file of `evaluate --json`; `UserError` for any other."""
    what = "figures of evaluate"
    found = read_json(pathlib.Path(path), what, _RESULTS_BYTES).get("results")
    if not (isinstance(found, list) and all("figures" in one for one in found)):
        raise UserError(f"{path!r} is no file of `evaluate --json`")
    return found


def curves(
    results: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, str], dict[str, list[tuple[float, float, str]]]]:
    """What the axes are, and of each augmentation level the points of a curve.

    A point is (alignment, distance, guidance), in the order of the weights, as in the
    paper's Fig. 4 and A.11. `UserError` when results lack one of the two figures.
    """
    axes, found = None, {}
    for result in results:
        figures = result["figures"]
        names = tuple(
            next((name for name in figures if name.startswith(kind)), "")
            for kind in (_ALIGNMENT, _DISTANCE)
        )
        if not all(names) or names != (axes or names):
            raise UserError(
                "a trade-off needs a score of alignment (--clip or --judge) and a "
                f"distance (--reference) of all samples: there is {', '.join(figures)}"
            )
        axes = names
        levels = [v for v in result.get("aug_level", []) if v is not None]
        weights = result.get("guidance", [])
        point = *(figures[name] for name in names), "/".join(map(_text, weights))
        # A guidance_schedule is a list, by its first weight.
        order = [w[0] if isinstance(w, list) else w for w in weights]
        found.setdefault("/".join(map(_text, levels)), []).append((order, point))
    return axes, {
        level: [point for _, point in sorted(own)] for level, own in found.items()
    }


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else json.dumps(value)


def draw(path: str, models: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draws the curves of models, each with its results, to an SVG, PNG or PDF file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    plot, named = figure.add_subplot(), {}
    for model, results in models.items():
        axes, found = curves(results)
        for level, points in found.items():
            label = f"{model}, aug {level}" if len(found) > 1 else model
            x, y, weights = zip(*points)
            (drawn,) = plot.plot(x, y, "o-", markersize=4, label=label)
            for *place, weight in points:
                plot.annotate(weight, place, (4, 4), textcoords="offset points")
            named[axes] = drawn
    if len(named) > 1:
        raise UserError(f"the models were measured differently: {sorted(named)}")
    plot.set(xlabel=axes[0], ylabel=axes[1])
    plot.legend()
    plot.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
