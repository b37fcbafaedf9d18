"""The page of a data card: one file that needs no program to be read."""

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.images import Unusable, opened

_SIDE = 96  # pixels of a small picture
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 1em auto;
  padding: 0 12px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 1.6em 0 .3em; }
h3 { font-size: 15px; margin: .6em 0 .2em; }
.flow { display: flex; flex-wrap: wrap; gap: 12px 32px; }
.flow > section { flex: 1 1 330px; max-width: 520px; }
figure { margin: 0; } img { display: block; max-width: 96px; height: auto; }
.pair { display: flex; gap: 2px; border: 1px solid #8886; padding: 4px; }
table { border-spacing: 0; width: 100%; } td { padding: 0 .7em 0 0; }
td:nth-child(2) { width: 50%; }
td:last-child { text-align: right; padding: 0;
  font-variant-numeric: tabular-nums; }
td i { display: block; height: .8em; background: #0b57d0; }
.plain td:nth-child(2) { width: 45%; text-align: left; overflow-wrap: anywhere; }
p.note, small { opacity: .75; } p { margin: .2em 0; }
"""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A record as the page shows it."""

    id: int
    caption: str
    image: str  # a URL with the picture in it

    @classmethod
    def of(cls, id: int, data: bytes, caption: bytes) -> "Shown":
        """That of a record; a picture that does not decode is empty."""
        file = io.BytesIO()
        try:
            with opened(data) as image:
                image.draft("RGB", (_SIDE, _SIDE))
                image.thumbnail((_SIDE, _SIDE))
                image.convert("RGB").save(file, "JPEG", quality=85)
        except Unusable:
            pass
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        return cls(int(id), caption.decode("utf8", "replace"), url)


def page(
    card: Mapping[str, Any],
    pictures: Iterable[Shown],
    pairs: Iterable[Iterable[Shown]],
) -> str:
    """The page of the content of card.json, with some pictures and near pairs."""
    source, same = card["source"], card["duplicates"]
    title = html.escape(str(source.get("source", "records")))
    scores = "".join(_measure(n, m) for n, m in card["scores"].items())
    frequent = [[text, f"{n:,} times"] for text, n in same["most_frequent_captions"]]
    words = ", ".join(
        f"{html.escape(word)} <small>{count:,}</small>"
        for word, count in card["frequent_words"].items()
    )
    doubles = {
        "pictures whose file is there before": same["equal_files"],
        "captions that are there before": same["equal_captions"],
        "pictures that look nearly like another": same["near_pictures"],
        "pairs of these": same["number_of_near_pairs"],
    }
    share = card["examples"] / 100
    rows = [[name, f"{n:,} ({n / share:.1f} %)"] for name, n in doubles.items()]
    rows[-1][1] = f"{same['number_of_near_pairs']:,}"
    together = "".join(
        f'<div class="pair">{"".join(map(_figure, pair))}</div>' for pair in pairs
    )
    unread = f", {card['not_decoded']:,} do not decode" if card["not_decoded"] else ""
    account = source.get("account", {})
    facts = {
        name: value for name, value in source.items() if value and value != account
    }
    facts |= {f"of these {name}": f"{n:,}" for name, n in account.items()}
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data card: {title}</title>
<style>{_STYLE}</style>
<h1>Data card: {title}</h1>
<p>{card["examples"]:,} pictures, {card["image_bytes"] / 2**20:,.1f} MiB{unread}</p>
<div class="flow">{"".join(map(_figure, pictures))}</div>
<h2>Pictures</h2>
<div class="flow">
{_measure("shorter side, pixels", card["shorter_side"])}
{_measure("width / height", card["aspect"])}</div>
<h2>Captions</h2>
<div class="flow">
{_measure("words", card["words"])}
{_measure("tokens, as embedded", card["tokens"])}
<section><h3>scripts of the letters</h3>{_bars(card["scripts"])}</section></div>
<h3>most frequent words</h3>
<p>{words}</p>
<h2>Duplicates</h2>
<div class="flow"><section>{_table(rows)}
<p class="note">Nearly: hashes of how brightness rises and falls (dHash) that differ
in at most {same["near_bits"]} of 64 bits, whatever the colours; of equal files one is
compared.</p></section>
<section>{_table(frequent)}</section></div>
<div class="flow">{together}</div>
<h2>Scores</h2>
<div class="flow">{scores or "<p>none</p>"}</div>
<h2>Where it comes from</h2>
{_table([name.replace("_", " "), value] for name, value in facts.items())}
</html>
"""


def _figure(shown: Shown) -> str:
    text = html.escape(f"{shown.id}: {shown.caption}")
    return f'<figure title="{text}"><img src="{shown.image}" alt="{text}"></figure>'


def _measure(name: str, measure: Mapping[str, Any]) -> str:
    """The quantiles of a number, and how many lie in ranges."""
    told = [f"{n} {x:,.4g}" for n, x in measure["quantiles"].items()]
    if measure["unknown"]:
        told.append(f"not known {measure['unknown']:,}")
    return (
        f"<section><h3>{html.escape(name)}</h3>{_bars(measure['counts'])}"
        f'<p class="note">{"; ".join(told)}</p></section>'
    )


def _bars(counts: Mapping[str, int]) -> str:
    most = max(counts.values(), default=0) or 1
    rows = "".join(
        f'<tr><td>{html.escape(name)}<td><i style="width:{100 * n / most:.1f}%"></i>'
        f"<td>{n:,}"
        for name, n in counts.items()
    )
    return f"<table>{rows}</table>"


def _table(rows: Iterable[Iterable[Any]]) -> str:
    cells = ("".join(f"<td>{html.escape(str(x))}" for x in row) for row in rows)
    return f'<table class="plain">{"".join(f"<tr>{row}" for row in cells)}</table>'
