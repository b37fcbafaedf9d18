"""The demo's page: pictures, table and loss curves in one HTML file."""

import dataclasses
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto;
  padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .3em .9em; text-align: right;
  border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, 112px);
  gap: 14px 10px; } figure { margin: 0; width: 112px; font-size: 12px;
  line-height: 1.3; } figure img { width: 112px; height: 112px; border: 1px solid #ddd;
  image-rendering: pixelated; } .wrong { color: #b00020; }
.curves { display: flex; gap: 2em; flex-wrap: wrap; } svg { background: #fafafa; }
"""


def read_curve(path: pathlib.Path) -> list[tuple[int, float]]:
    """`(step, loss)` of every line of a metrics.jsonl."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def _curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    """An SVG of a loss over steps; the loss axis starts at 0."""
    width, height, left, bottom = 430, 200, 50, 30
    last = max((step for step, _ in points), default=1)
    top = max((loss for _, loss in points), default=1.0)
    line = " ".join(
        f"{left + step / last * (width - left - 10):.1f},"
        f"{height - bottom - loss / top * (height - bottom - 10):.1f}"
        for step, loss in points
    )
    return (
        f"<div><b>{html.escape(name)}</b><br>"
        f'<svg width="{width}" height="{height}" font-size="11">'
        f'<polyline points="{line}" fill="none" stroke="#0b57d0" stroke-width="1.5"/>'
        f'<path d="M{left} 10V{height - bottom}H{width - 10}" fill="none" '
        'stroke="#888"/>'
        f'<text x="{left - 6}" y="16" text-anchor="end">{top:.2f}</text>'
        f'<text x="{left - 6}" y="{height - bottom}" text-anchor="end">0</text>'
        f'<text x="{width - 10}" y="{height - 12}" text-anchor="end">step {last}</text>'
        "</svg></div>"
    )


def _figure(index: int, prompt: str, verdict: Any) -> str:
    wrong = [name for name, right in dataclasses.asdict(verdict).items() if not right]
    note = f'<div class="wrong">{", ".join(wrong)}</div>' if wrong else ""
    return (
        f'<figure><img src="samples/{index:04d}.png" alt="">'
        f"{html.escape(prompt)}{note}</figure>"
    )


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    names = [n for n in next(iter(rows.values())) if n.endswith("_accuracy")]
    head = "".join(f"<th>{n.removesuffix('_accuracy')}</th>" for n in names)
    body = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{row['judged_pictures']}</td>"
        + "".join(f"<td>{row[n]:.0%}</td>" for n in names)
        + "</tr>"
        for label, row in rows.items()
    )
    head = f"<tr><th>held-out captions</th><th>pictures</th>{head}</tr>"
    return f"<table>{head}{body}</table>"


def render(
    report: Mapping[str, Any],
    prompts: Sequence[str],
    verdicts: Sequence[Any],
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> str:
    """The page; its pictures are samples/NNNN.png beside it.

    Args:
      report: of `demo.demo`.
      prompts: the captions, one per picture.
      verdicts: of the judge, with guidance on.
      curves: points of each stage's loss.
    """
    steps = ", ".join(f"{k} {v} steps" for k, v in report["training_steps"].items())
    guidance = ", ".join(f"{w:g} for {k}" for k, w in report["guidance"].items())
    figures = "".join(
        _figure(i, p, v) for i, (p, v) in enumerate(zip(prompts, verdicts, strict=True))
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>imagen-jax demo</title>
<style>{_STYLE}</style>
<h1>imagen-jax demo</h1>
<p>A base stage (text to 16 pixels) and a super-resolution stage (16 to 32 pixels),
trained just now ({html.escape(steps)}) on drawn scenes and sampled with captions whose
combinations of colour and shape were never trained on. {report["seconds"]:.0f} seconds
in all, at most {report["peak_memory_gib"]:.1f} GiB of memory.</p>
<h2>Judged by a program that looks only at the picture and the caption</h2>
{_table(report["accuracy"])}
<h2>Pictures</h2>
<p>With guidance (w = {guidance}). What the judge finds wrong is in red.</p>
<div class="pictures">{figures}</div>
<h2>Loss</h2>
<div class="curves">{"".join(_curve(k, v) for k, v in curves.items())}</div>
</html>
"""
