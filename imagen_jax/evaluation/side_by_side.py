"""A page that shows the pictures of several models side by side, by category."""

import html
import urllib.parse
from collections.abc import Mapping, Sequence

from imagen_jax.evaluation.study import Row

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1200px; margin: auto; padding: 1em; }
h2 { margin: 1.5em 0 .3em; } p { margin: 0; }
.pictures { display: grid; gap: 24px; margin-top: 12px; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, WIDTHpx), 1fr)); }
figure { margin: 0; }
.row { display: grid; grid-template-columns: repeat(COUNT, 1fr); gap: 8px; }
img { width: 100%; aspect-ratio: 1; outline: 1px solid #8884; }
img.small { image-rendering: pixelated; }
.row div { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
"""
# Few pixels are to be seen as such.
_SMALL = """onload="this.classList.toggle('small', naturalWidth < 128)" """


def page(
    rows: Sequence[Row], scores: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> str:
    """The page: of each category the scores, then the rows.

    Args:
      rows: of the same models. The pictures of each lie in a folder of its name.
      scores: of a model, figures by category and name, if there are any.
    """
    models = list(rows[0].files)
    groups = {}
    for row in rows:
        groups.setdefault(row.category, []).append(_figure(row))
    sections = "".join(
        f"<h2>{html.escape(category or 'Pictures')}</h2>\n{_figures(category, scores)}"
        f'<div class="pictures">\n{"".join(figures)}</div>\n'
        for category, figures in groups.items()
    )
    style = _STYLE.replace("COUNT", str(len(models)))
    style = style.replace("WIDTH", str(min(1100, 180 * len(models))))
    title = html.escape(" beside ".join(models))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style>
<h1>{title}</h1>
<p>{len(rows):,} pictures of each, of the same prompts.</p>
{sections}</html>
"""


def _figure(row: Row) -> str:
    tiles = ""
    for model, path in row.files.items():
        address = urllib.parse.quote(f"{model}/{path.name}")
        tiles += (
            f'<div><a href="{address}"><img loading="lazy" alt="" {_SMALL} '
            f'src="{address}"></a>{html.escape(model)}</div>\n'
        )
    caption = html.escape(row.caption)
    return f'<figure>{caption}<div class="row">{tiles}</div></figure>\n'


def _figures(
    category: str, scores: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> str:
    told = ""
    for model, own in scores.items():
        if figures := own.get(category):
            values = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            told += f"<p>{html.escape(f'{model}: {values}')}</p>\n"
    return told
