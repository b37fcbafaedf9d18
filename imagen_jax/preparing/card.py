"""A data card: what is in records, counted in one pass over them."""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from imagen_jax.data import memory, start_tensorflow
from imagen_jax.data.manifest import Manifest, read_manifest
from imagen_jax.errors import UserError
from imagen_jax.files import read_json
from imagen_jax.images import Unusable, opened, png
from imagen_jax.preparing.card_page import page
from imagen_jax.preparing.duplicates import NEAR, dhash, near_pairs

# Records in memory at a time, decoded in several threads.
_CHUNK = 256
# Different words that are counted; when there are more, the rarer half is forgotten.
_MOST_WORDS = 2**20
_WORDS, _PICTURES, _PAIRS = 20, 24, 12  # what is shown
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
# Borders of the ranges that are counted.
_SIDES = (32, 64, 128, 256, 512, 1024, 2048)
_ASPECTS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
_LENGTHS = (1, 3, 6, 11, 21, 41, 81)
# What is kept of each record to the end; hashes have 64 bits.
_ROW = [("width", "i4"), ("height", "i4"), ("file", "u8"), ("looks", "u8")]
_ROW += [("caption", "u8"), ("words", "i4")]


def write_card(records: str) -> epath.Path:
    """Writes card.html and card.json into a folder of records, or beside a .npz file.

    Returns the path of the page.
    """
    manifest = read_manifest(records)
    kept, words, scripts = _read(records, manifest)
    duplicates, pairs = _duplicates(kept)
    good = kept[kept["width"] > 0]
    scores = {n: _measure(kept["scores"][:, k]) for k, n in enumerate(manifest.scores)}
    card = {
        "pictures": {
            "number": len(kept),
            "bytes": manifest.image_bytes,
            "not_decoded": len(kept) - len(good),
            "shorter_side": _measure(np.minimum(good["width"], good["height"]), _SIDES),
            "width_by_height": _measure(good["width"] / good["height"], _ASPECTS),
        },
        "captions": {
            "cut": manifest.cut_captions,
            "words": _measure(kept["words"], _LENGTHS),
            "scripts": {"counts": dict(scripts.most_common())},
            "frequent_words": {"counts": dict(words.most_common(_WORDS))},
        },
        "duplicates": duplicates,
        "scores": scores,
        "source": {name: value for name, value in manifest.settings.items() if value}
        | {f"of_{manifest.holds}_{kind}": n for kind, n in manifest.account.items()}
        | {"encoder": manifest.encoder, "content_sha256": manifest.content_sha256},
    }
    spread = np.linspace(0, len(kept) - 1, _PICTURES).astype(int)[:, None].tolist()
    wanted = {*itertools.chain(*spread, *pairs)}
    rows = enumerate(_rows(records, manifest))
    shown = {place: row for place, row in rows if place in wanted}
    pictures = {
        name: [[shown[place] for place in own] for own in places]
        for name, places in (("pictures", spread), ("duplicates", pairs))
    }
    start = _start(records)
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    epath.Path(f"{start}.json").write_text(text)
    made = epath.Path(f"{start}.html")
    made.write_text(page(card, pictures))
    return made


def read_card(records: str) -> dict[str, Any] | None:
    """What `write_card` counted in records; None if it did not."""
    path = epath.Path(f"{_start(records)}.json")
    return read_json(path, "a data card") if path.exists() else None


def _start(records: str) -> epath.Path:
    """How the paths of a card begin."""
    path = epath.Path(records)
    return path / "card" if path.is_dir() else path.with_suffix(".card")


def _rows(records: str, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Every record: "id"; "image" and "caption", bytes; "scores" `[K]`."""
    if epath.Path(records).is_dir():
        start_tensorflow()
        from imagen_jax.data.records import read_rows

        return read_rows(records, manifest)
    values = memory.read(records, manifest)
    columns = {
        "id": values["id"],
        "image": map(png, values["image"]),
        "caption": memory.read_captions(records, manifest.examples),
        "scores": values.get("scores", np.zeros((manifest.examples, 0))),
    }
    return (dict(zip(columns, row)) for row in zip(*columns.values()))


def _read(
    records: str, manifest: Manifest
) -> tuple[np.ndarray, collections.Counter, collections.Counter]:
    """A row of numbers for each record; words and scripts of all captions, counted."""
    kind = [*_ROW, ("scores", "f4", (len(manifest.scores),))]
    kept, place = np.zeros(manifest.examples, kind), 0
    words, scripts = collections.Counter(), collections.Counter()
    rows = itertools.islice(_rows(records, manifest), len(kept))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            looks = pool.map(_look, [row["image"] for row in chunk])
            for row, look in zip(chunk, looks):
                caption = row["caption"].decode("utf8", "replace")
                found = re.findall(r"\w+(?:['’]\w+)*", caption.lower())
                words.update(found)
                scripts[_scripts(caption)] += 1
                text = _hash(row["caption"]), len(found)
                kept[place] = (*look, *text, row["scores"])
                place += 1
            if len(words) > _MOST_WORDS:
                words = collections.Counter(dict(words.most_common(_MOST_WORDS // 2)))
    if place < len(kept):
        raise UserError(f"{records!r} has only {place} of {len(kept)} records")
    return kept, words, scripts


def _look(data: bytes) -> tuple[int, int, int, int]:
    """Width and height, 0 if it does not decode; hashes of its file and its looks."""
    try:
        with opened(data) as image:
            size = image.size
            image.draft("L", (64, 64))
            return *size, _hash(data), dhash(image)
    except Unusable:
        return 0, 0, _hash(data), 0


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _scripts(caption: str) -> str:
    """The scripts of a caption's letters: the first words of their Unicode names."""
    letters = filter(str.isalpha, unicodedata.normalize("NFKC", caption))
    return " + ".join(sorted({*map(_script, letters)})) or "no letters"


@functools.lru_cache(2**16)
def _script(letter: str) -> str:
    return re.split("[ -]", unicodedata.name(letter, "unnamed"))[0].lower()


def _measure(values: np.ndarray, edges: Sequence[float] = ()) -> dict[str, Any]:
    """Quantiles of numbers, and how many lie in ranges; NaN is "unknown"."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"unknown": len(values), "counts": {}, "quantiles": {}}
    if not edges:
        edges = np.histogram_bin_edges(known.astype(float), 10)[1:-1].tolist()
    step, form = (1, ",d") if values.dtype.kind == "i" else (0, ".3g")
    between = [f"{a:{form}} to {b - step:{form}}" for a, b in itertools.pairwise(edges)]
    labels = [f"under {edges[0]:{form}}", *between, f"{edges[-1]:{form}} or more"]
    place = np.searchsorted(edges, known, "right")
    counts = np.bincount(place).tolist()
    quantiles = [f"{x:.4g}" for x in np.percentile(known, _QUANTILES)]
    return {
        "unknown": len(values) - len(known),
        "counts": dict(list(zip(labels, counts))[place.min() :]),
        "quantiles": {f"{q} %": float(x) for q, x in zip(_QUANTILES, quantiles)},
    }


def _duplicates(kept: np.ndarray) -> tuple[dict[str, int], list[list[int]]]:
    """How many there are, and places of some near pictures."""
    _, files = np.unique(kept["file"], return_index=True)
    numbers = {
        "equal_files": len(kept) - len(files),
        "equal_captions": len(kept) - len(np.unique(kept["caption"])),
    }
    # Of equal files one.
    files = files[kept["width"][files] > 0]
    count, is_near, pairs = 0, np.zeros(len(kept), bool), []
    for found in near_pairs(kept["looks"][files]):
        places = files[found]
        count += len(places)
        is_near[places] = True
        pairs = [*pairs, *places[:_PAIRS].tolist()][:_PAIRS]
    numbers |= {"near_bits": NEAR, "near_pictures": int(is_near.sum())}
    return numbers | {"near_pairs": count}, pairs
