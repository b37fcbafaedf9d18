"""The page of a workdir: one file that a browser can keep open while it trains."""

import html
import json
import math
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from imagen_jax.config import StageConfig, to_json
from imagen_jax.training.goodput import Report, goodput

_POINTS = 500  # of a curve
# Whether an axis is logarithmic.
_CURVES = {"loss": True, "heldout_loss": True, "heldout_ema_loss": True}
_CURVES |= {"gradient_norm": True, "learning_rate": False}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 1em auto;
  padding: 0 12px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 1.2em 0 .3em; }
.curves { display: flex; flex-wrap: wrap; gap: 12px; }
svg { flex: 1 1 300px; max-width: 460px; height: auto; }
figure { margin: 0 0 1em; } figure, pre { overflow-x: auto; } pre { font-size: 12px; }
td { padding-right: 1.5em; }
td + td { text-align: right; font-variant-numeric: tabular-nums; }
"""


def page(
    cfg: StageConfig,
    metrics: Sequence[str],
    events: Iterable[str],
    previews: Sequence[str],
    evaluations: Iterable[str] = (),
) -> str:
    """The page: curves, previews, where the time went, and the config.

    `metrics`, `events` and `evaluations` are the lines of these files, `previews` the
    newest pictures first, by paths that the page can name.
    """
    report = goodput(events)
    every = 1 + len(metrics) // _POINTS
    # Held-out losses have lines of their own, which are few.
    thinned = [x for i, x in enumerate(metrics) if i % every == 0 or "heldout" in x]
    rows = list(map(json.loads, [*thinned, *metrics[-1:]]))
    steps = [row for row in rows if "heldout_loss" not in row]
    curves = "".join(
        curve(
            name.replace("_", " "),
            [(row["step"], row[name]) for row in rows if name in row],
            log,
        )
        for name, log in _CURVES.items()
    )
    measured = sorted(map(json.loads, evaluations), key=lambda row: row["step"])
    curves += "".join(
        curve(name, [(r["step"], r["figures"][name]) for r in measured])
        for name in (measured[-1]["figures"] if measured else ())
        if all(name in row["figures"] for row in measured)
    )
    pictures = "".join(
        f"<figure><figcaption>step {int(pathlib.Path(name).stem):,}</figcaption>"
        f'<a href="{name}"><img src="{name}" alt="preview"></a></figure>\n'
        for name in map(html.escape, previews)
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="60">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(cfg.name)}: {report.last_step}</title>
<style>{_STYLE}</style>
<h1>{html.escape(cfg.name)}, {cfg.image_size} pixels</h1>
<p>{_progress(cfg, report, steps[-1] if steps else {})}</p>
<div class="curves">
{curves}</div>
<h2>Previews</h2>
{pictures or "<p>none yet</p>"}
<h2>Where the time went</h2>
{_times(report)}
<h2>Config</h2>
<details><summary>all values</summary><pre>{html.escape(to_json(cfg))}</pre></details>
</html>
"""


def _progress(cfg: StageConfig, report: Report, row: dict[str, Any]) -> str:
    """Where the run stands, and about how long the rest takes without interruptions."""
    last, step = cfg.training.steps, report.last_step
    parts = [f"step {step:,} of {last:,}"]
    rate = row.get("steps_per_second")
    if rate and step < last:
        minutes = round((last - step) / rate / 60)
        parts.append(f"{row['images_per_second']:,.3g} images per second")
        parts.append(f"{minutes // 60} h {minutes % 60} min of steps to go")
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    parts.append(f"{report.last_event}, {now}")
    return html.escape("; ".join(parts))


def _times(report: Report) -> str:
    wall = report.wall_seconds or 1.0
    rows = "".join(
        f"<tr><td>{name.replace('_', ' ')}<td>{spent:,.0f} s<td>{spent / wall:.1%}"
        for name, spent in report.seconds.items()
        if spent >= 0.5
    )
    share = f"Goodput {report.goodput:.1%} of {wall:,.0f} s"
    return f"<p>{share}, started {report.runs} times.</p><table>{rows}</table>"


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
