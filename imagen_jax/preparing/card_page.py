"""The page of a data card: one file that needs no program to be read."""

import base64
import contextlib
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.images import Unusable, opened

_SIDE = 96  # pixels of a small picture
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 1em auto;
  padding: 0 12px; overflow-wrap: anywhere; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 1.6em 0 .3em; }
h3 { font-size: 15px; margin: .6em 0 .2em; }
.flow { display: flex; flex-wrap: wrap; gap: 12px 32px; }
section { flex: 1 1 330px; max-width: 520px; }
figure { display: flex; gap: 2px; margin: 0; border: 1px solid #8884; padding: 3px; }
table { border-spacing: 0; width: 100%; }
td { padding: 0 .7em 0 0; } td:nth-child(2) { width: 50%; }
td:nth-child(3) { text-align: right; font-variant-numeric: tabular-nums; }
i { display: block; height: .8em; background: #0b57d0; }
small { opacity: .75; }
"""
_NOTES = {
    "captions": "Scripts are those of the letters: which language it is nobody knows.",
    "duplicates": "Near are pictures whose hashes of how brightness rises and falls "
    "(dHash) differ in few of 64 bits; colours do not count. Of equal files one does.",
}


def page(
    card: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> str:
    """The page of the content of card.json, with groups of records in its parts."""
    title = html.escape(f"Data card of {card['source'].get('source', '')}")
    parts = "".join(
        f'<h2>{name}</h2>\n<div class="flow">{_entries(entries)}</div>'
        f"<p><small>{_NOTES.get(name, '')}</small>"
        f'<div class="flow">{"".join(map(_figure, pictures.get(name, ())))}</div>\n'
        for name, entries in card.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
<h1>{title}</h1>
{parts}</html>
"""


def _entries(entries: Mapping[str, Any]) -> str:
    """Single values in one table, and one of bars for each that was counted."""
    single = {n: x for n, x in entries.items() if not isinstance(x, dict)}
    rows = "".join(
        f"<tr><td>{_name(n)}<td>{html.escape(f'{x:,}' if type(x) is int else str(x))}"
        for n, x in single.items()
    )
    counted = (_counted(n, entries[n]) for n in entries if n not in single)
    table = f"<section><table>{rows}</table></section>" if rows else ""
    return table + "".join(counted)


def _counted(name: str, measure: Mapping[str, Any]) -> str:
    """Bars of how many there are of each, and the quantiles."""
    most = max(measure["counts"].values(), default=0)
    rows = "".join(
        f'<tr><td>{html.escape(label)}<td><i style="width:{n / most:.1%}"></i><td>{n:,}'
        for label, n in measure["counts"].items()
    )
    told = [f"{at}: {x:,.4g}" for at, x in measure.get("quantiles", {}).items()]
    told += [f"unknown: {measure['unknown']:,}"] if measure.get("unknown") else []
    return (
        f"<section><h3>{_name(name)}</h3><table>{rows}</table>"
        f"<small>{'; '.join(told)}</small></section>"
    )


def _name(name: str) -> str:
    return html.escape(name.replace("_", " "))


def _figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Small pictures side by side, with their numbers and captions to point at."""
    images = ""
    for row in rows:
        text = html.escape(f"{row['id']}: {row['caption'].decode('utf8', 'replace')}")
        file, (width, height) = io.BytesIO(), (0, 0)
        with contextlib.suppress(Unusable), opened(row["image"]) as image:
            image.thumbnail((_SIDE, _SIDE))
            image.convert("RGB").save(file, "JPEG", quality=85)
            width, height = image.size
        data = base64.b64encode(file.getvalue()).decode()
        images += (
            f'<img src="data:image/jpeg;base64,{data}" width="{width}" '
            f'height="{height}" alt="{text}" title="{text}">'
        )
    return f"<figure>{images}</figure>"
