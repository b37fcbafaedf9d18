"""What was found, as a page, as Markdown and as plots."""

import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.claims import colours
from benchmarks.claims.claims import CLAIMS, Claim, Plot
from benchmarks.claims.intervals import contrast, interval, outcome, verdict
from benchmarks.claims.runs import Lab, slug, values
from benchmarks.claims.worlds import COLOURS
from imagen_jax import images

_INK = ("#0b57d0", "#b3261e", "#137333", "#b06000", "#6a1b9a", "#00696f", "#5f6368")
_WIDTH, _HEIGHT, _LEFT = 460, 250, 48
# Captions that the sheet shows.
_SHOWN = 12
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: auto; }
body { padding: 1em; } .scroll { overflow-x: auto; } td, th { padding: 2px 8px; }
table { border-collapse: collapse; font-size: 13px; }
td, th { text-align: left; vertical-align: top; } .confirmed { color: #137333; }
.refuted { color: #b3261e; } svg { max-width: 100%; height: auto; }
img { max-width: 100%; } details { font-size: 12px; overflow-wrap: anywhere; }
"""


class Found(NamedTuple):
    """A claim's figures and what follows from them."""

    claim: Claim
    verdict: str
    table: list[list[str]]  # of arms; a head, then a row for each
    criteria: list[list[str]]  # likewise
    plots: list[str]  # SVG
    commands: list[str]
    seeds: int


def find(lab: Lab, claim: Claim, seeds: Sequence[int]) -> Found:
    """All that a claim's results say; they must be there."""
    head = ["", *(f"{measure}, {k}" if k else measure for measure, k in claim.columns)]
    results = {
        arm.label: [lab.sample(arm, seed) for seed in seeds] for arm in claim.arms
    }
    cells = [values(results, *column) for column in claim.columns]
    table = [head]
    for arm in claim.arms:
        own = (cell.get(arm.label) for cell in cells)
        table.append([arm.label, *("" if v is None else _cell(v) for v in own)])
    criteria, outcomes = [["what must hold", "seen", "needed", "outcome"]], []
    for one in claim.criteria:
        arms = values(results, one.measure, one.kind)
        seen, low, high = "not measured", -np.inf, np.inf
        if {label for label, _ in one.weights} <= set(arms):
            mean, low, high = interval(contrast(arms, one.weights))
            seen = f"{mean:.3g} [{low:.3g}, {high:.3g}]"
        outcomes.append(outcome(low, high, one))
        needed = f"above {one.above:g}"
        if one.within is not None:
            needed = f"within {one.within:g}"
        criteria.append([one.says, seen, needed, outcomes[-1]])
    plots = [_plot(results, plot) for plot in claim.plots]
    if claim.curves:
        plots += _curves(lab, claim, seeds)
    first = seeds[0]
    words = [lab.train(training, first)["command"] for training in claim.trainings]
    words += [own[0]["command"] for own in results.values()]
    commands = [" ".join(["python", *one]) for one in words if one]
    overall = verdict(outcomes)
    return Found(claim, overall, table, criteria, plots, commands, len(seeds))


def _cell(rows: np.ndarray) -> str:
    mean, low, high = interval(rows)
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def _plot(results: Mapping[str, Sequence[Mapping[str, Any]]], plot: Plot) -> str:
    lines = []
    for name, points in plot.lines:
        drawn = []
        for x, label, kind in points:
            rows = values(results, plot.measure, kind)
            drawn.append((x, *interval(rows[label])))
        lines.append((name, drawn))
    return svg(plot.x, plot.measure, lines)


def _curves(lab: Lab, claim: Claim, seeds: Sequence[int]) -> list[str]:
    """The loss against the time and the arithmetic of training the last stage."""
    plots = {"minutes": [], "TFLOP per example of a batch": []}
    for arm in claim.arms:
        found = [lab.train(arm.stages[-1], seed) for seed in seeds]
        steps = [step for step, _ in found[0]["curve"]]
        losses = np.array([[loss for _, loss in one["curve"]] for one in found])
        seconds = np.median([one["step_seconds"] or 0 for one in found])
        units = seconds / 60, 3 * found[0]["gflop"] / 1e3
        for lines, unit in zip(plots.values(), units):
            spread = losses.mean(0), losses.min(0), losses.max(0)
            # The first points would hide all others.
            points = list(zip([s * unit for s in steps], *map(list, spread)))
            lines.append((arm.label, points[len(points) // 10 :]))
    return [svg(x, "loss", lines) for x, lines in plots.items()]


def svg(
    x_name: str,
    y_name: str,
    lines: Sequence[tuple[str, Sequence[tuple[Any, float, float, float]]]],
) -> str:
    """Lines through points `(x, y, low, high)`, each with its interval.

    An x that is no number is a name on the axis.
    """
    every = [point for _, points in lines for point in points]
    names = [x for x in dict.fromkeys(p[0] for p in every) if isinstance(x, str)]
    places = {name: i for i, name in enumerate(names)}
    xs = [places.get(p[0], p[0]) for p in every]
    ends = [y for p in every for y in p[1:]]
    (left, right), (bottom, top) = _range(xs, 0.08), _range(ends, 0.05)

    def at_x(x: Any) -> float:
        share = (places.get(x, x) - left) / (right - left)
        return _LEFT + share * (_WIDTH - _LEFT)

    def at_y(y: float) -> float:
        return _HEIGHT - (y - bottom) / (top - bottom) * (_HEIGHT - 10)

    parts = []
    for y in _ticks(bottom, top):
        parts.append(
            f'<path d="M{_LEFT} {at_y(y):.1f}H{_WIDTH}" stroke="#8884"/>'
            f'<text x="{_LEFT - 4}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:.6g}'
            "</text>"
        )
    own = names or sorted(set(xs))
    for x in own if len(own) < 9 else _ticks(left, right):
        shown = html.escape(x) if isinstance(x, str) else f"{x:.6g}"
        parts.append(
            f'<text x="{at_x(x):.1f}" y="{_HEIGHT + 16}" text-anchor="middle">{shown}'
            "</text>"
        )
    for number, (name, points) in enumerate(lines):
        ink = _INK[number % len(_INK)]
        shift = 3 * (number - (len(lines) - 1) / 2) if names else 0
        line = " ".join(f"{at_x(x) + shift:.1f},{at_y(y):.1f}" for x, y, *_ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{ink}"/>')
        for x, y, low, high in points:
            at = at_x(x) + shift
            parts.append(
                f'<path d="M{at:.1f} {at_y(low):.1f}V{at_y(high):.1f}" stroke="{ink}"/>'
                f'<circle cx="{at:.1f}" cy="{at_y(y):.1f}" r="2.5" fill="{ink}"/>'
            )
        parts.append(
            f'<text x="{_WIDTH + 8}" y="{20 + 16 * number}" fill="{ink}">'
            f"{html.escape(name)}</text>"
        )
    title = html.escape(f"{y_name} by {x_name}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 160} 295" '
        f'width="{_WIDTH + 160}" font-size="12" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}'
        f'<text x="{_LEFT}" y="{_HEIGHT + 36}">{title}</text></svg>\n'
    )


def _range(found: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(found), max(found)
    room = (high - low or abs(high) or 1.0) * margin
    return low - room, high + room


def _ticks(low: float, high: float) -> np.ndarray:
    """Five to thirteen round numbers within an interval."""
    size = 10.0 ** np.floor(np.log10((high - low) / 5))
    step = max(size * n for n in (1, 2, 5) if size * n <= (high - low) / 5)
    # No "-0".
    return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0


def sheet(lab: Lab, claim: Claim, seed: int) -> np.ndarray | None:
    """Pictures of captions taken evenly from the list, enlarged; one row per arm.

    For a claim about colours the captions are names with a word that is never trained
    on, and a last row shows the named colours. None if a claim asks for no pictures.
    """
    worlds = [arm.asks for arm in claim.arms]
    world = COLOURS if COLOURS in worlds else worlds[0]
    arms = [arm for arm in claim.arms if arm.asks == world]
    folders = [lab.root / "samples" / f"{slug(arm)}-s{seed}" for arm in arms]
    if not folders[0].exists():
        return None
    if world == COLOURS:
        asked = COLOURS.ask(lab.root)
        unseen = (i for i, one in enumerate(asked) if one.kind == "words")
        numbers = {asked[i].about[0]: i for i in unseen}
    else:
        # What was asked; the folder of the pictures need not be given again.
        file = lab.root / "prompts" / f"{world.name}.txt"
        lines = file.read_text("utf8").splitlines()
        numbers = {line: i for i, line in enumerate(lines)}
    labels = [list(numbers)[i] for i in _evenly(len(numbers), _SHOWN)]
    chosen = [numbers[label] for label in labels]
    names = [arm.label.rpartition(": ")[2] for arm in arms]
    rows = []
    for folder in folders:
        rows += [images.read(folder / f"{i:04d}.png") for i in chosen]
    if world == COLOURS:
        names.append("as named")
        size, known = rows[0].shape[0], colours.named()
        for name, shape in (asked[i].about for i in chosen):
            rows.append(colours.draw(known[name], shape, size))
    above = [""] * (len(rows) - len(chosen))
    enlarged = images.enlarge(np.stack(rows), 64)
    return images.grid(enlarged, len(chosen), above + labels, names)


def _evenly(count: int, wanted: int) -> list[int]:
    return [i * count // min(count, wanted) for i in range(min(count, wanted))]


def write(lab: Lab, found: Sequence[Found]) -> pathlib.Path:
    """Writes index.html, claims.md, claims.json, and the plots; returns the page."""
    lab.root.mkdir(parents=True, exist_ok=True)
    texts, marked = [], [_markdown(_overview(found))]
    for one in found:
        claim = one.claim
        title = claim.name.replace("_", " ")
        about = f"{claim.says} Seeds: {one.seeds}."
        names = []
        for number, plot in enumerate(one.plots):
            names.append(f"{claim.name}-{number}.svg")
            (lab.root / names[-1]).write_text(plot, "utf8")
        drawn = sheet(lab, claim, 0)
        shown = ""
        if drawn is not None:
            images.save(lab.root / f"{claim.name}.png", drawn)
            shown = f'<p><img alt="" src="{claim.name}.png"></p>'
            names.append(f"{claim.name}.png")
        texts.append(
            f'<h2 class="{one.verdict}">{html.escape(title)}: {one.verdict}</h2>'
            f"<p>{html.escape(about)}</p>{_html(one.criteria)}{shown}"
            f"{''.join(one.plots)}{_html(one.table)}<details><summary>commands"
            f"</summary>{'<br>'.join(map(html.escape, one.commands))}</details>"
        )
        pictures = "\n".join(f"![{title}]({name})" for name in names)
        parts = f"## {title}: {one.verdict}", about, _markdown(one.criteria)
        marked += [*parts, pictures, _markdown(one.table)]
    page = lab.root / "index.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>The paper's claims</title><style>{_STYLE}</style>"
        "<h1>The paper's claims, in the small</h1><p>Means and 95 % intervals over "
        "trainings and captions.</p>"
        f"{_html(_overview(found))}{''.join(texts)}</html>\n",
        "utf8",
    )
    (lab.root / "claims.md").write_text("\n\n".join(marked) + "\n", "utf8")
    kept = {f.claim.name: {"verdict": f.verdict, "criteria": f.criteria} for f in found}
    (lab.root / "claims.json").write_text(json.dumps(kept, indent=1) + "\n")
    return page


def _overview(found: Sequence[Found]) -> list[list[str]]:
    rows = [["claim", "what the paper says", "outcome"]]
    verdicts = {one.claim.name: one.verdict for one in found}
    for name, claim in {**CLAIMS, **{f.claim.name: f.claim for f in found}}.items():
        rows.append([name.replace("_", " "), claim.says, verdicts.get(name, "not run")])
    return rows


def _html(rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(rows), rows)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
