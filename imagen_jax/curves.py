"""Curves as SVG, for pages that need no program to be read."""

import html
import math
from collections.abc import Sequence


def curve(name: str, points: Sequence[tuple[float, float]], log: bool = False) -> str:
    """An SVG of a value over steps, its axis from 0, or logarithmic where it is `log`.

    `points` are (step, value), in order. Those that such an axis cannot show are left
    out; without any the result is empty.
    """
    points = [(s, y) for s, y in points if math.isfinite(y) and (y > 0 or not log)]
    if not points:
        return ""
    (last, value), top = points[-1], max(y for _, y in points)
    low = min(y for _, y in points) if log else 0.0
    span = math.log(top / low) if log else top
    line = " ".join(
        f"{s / (last or 1) * 400:.1f},"
        f"{200 - (math.log(y / low) if log else y) / (span or 1) * 190:.1f}"
        for s, y in points
    )
    marks = {200: low, 105: math.sqrt(low * top) if log else top / 2, 10: top}
    axis = "".join(
        f'<path d="M0 {y}H400" stroke="#8884"/>'
        f'<text x="404" y="{y + 4}">{at:.3g}</text>'
        for y, at in marks.items()
    )
    return (
        '<svg viewBox="0 0 460 225" width="460" font-size="12" fill="currentColor">'
        f'{axis}<polyline points="{line}" fill="none" stroke="#0b57d0"/><text y="218">'
        f"{html.escape(name)}: {value:.4g} at step {last:,}</text></svg>\n"
    )
