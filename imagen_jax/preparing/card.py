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
from imagen_jax.images import Unusable, opened, png
from imagen_jax.preparing.card_page import page
from imagen_jax.preparing.duplicates import NEAR, dhash, near_pairs
from imagen_jax.preparing.images import MAX_PIXELS
from imagen_jax.text import embeddings

# Records in memory at a time, decoded in several threads.
_CHUNK = 256
# Different words that are counted; when there are more, the rarer half is forgotten.
_MOST_WORDS = 2**20
_FREQUENT, _PICTURES, _PAIRS = 20, 24, 12  # what is shown
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
# Borders of the ranges that are counted.
_SIDES = (32, 64, 128, 256, 512, 1024, 2048)
_ASPECTS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
_LENGTHS = (1, 3, 6, 11, 21, 41, 81)
# What is kept of each record to the end; hashes have 64 bits.
_ROW = [("width", "i4"), ("height", "i4"), ("file", "u8"), ("looks", "u8")]
_ROW += [("caption", "u8"), ("words", "i4"), ("tokens", "i4")]


def write_card(records: str) -> tuple[epath.Path, dict[str, Any]]:
    """Writes card.html and card.json into a folder of records, or beside a .npz file.

    Returns:
      the path of the page, and the content of card.json.
    """
    manifest = read_manifest(records)
    kept, words, scripts = _read(records, manifest)
    duplicates, captions, pairs = _duplicates(kept)
    spread = np.linspace(0, len(kept) - 1, _PICTURES).astype(int).tolist()
    wanted = {*spread, *captions, *itertools.chain(*pairs)}
    rows = enumerate(_rows(records, manifest))
    shown = {place: row for place, row in rows if place in wanted}
    duplicates["frequent_captions"] = {
        "counts": {
            shown[i]["caption"].decode("utf8", "replace"): n
            for i, n in captions.items()
        }
    }
    duplicates["near_examples"] = [
        [int(shown[i]["id"]) for i in pair] for pair in pairs
    ]
    good = kept[kept["width"] > 0]
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
            "tokens": _measure(kept["tokens"], _LENGTHS),
            "scripts": {"counts": dict(scripts.most_common())},
            "frequent_words": {"counts": dict(words.most_common(_FREQUENT))},
        },
        "duplicates": duplicates,
        "scores": {
            name: _measure(kept["scores"][:, k])
            for k, name in enumerate(manifest.scores)
        },
        "source": {name: x for name, x in manifest.settings.items() if x}
        | {f"of_{manifest.holds}_{kind}": n for kind, n in manifest.account.items()}
        | {"encoder": manifest.encoder, "embedding_dtype": manifest.embedding_dtype}
        | {"content_sha256": manifest.content_sha256},
    }
    pictures = [[shown[place]] for place in spread]
    made = page(card, pictures, [[shown[place] for place in pair] for pair in pairs])
    path = epath.Path(records)
    start = path / "card" if path.is_dir() else path.with_suffix(".card")
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    epath.Path(f"{start}.json").write_text(text)
    epath.Path(f"{start}.html").write_text(made)
    return epath.Path(f"{start}.html"), card


def _rows(records: str, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Every record: "id"; "image" and "caption", bytes; "tokens"; "scores" `[K]`."""
    if epath.Path(records).is_dir():
        start_tensorflow()
        from imagen_jax.data.records import read_rows

        width = embeddings.row_bytes(manifest.text_dim, manifest.embedding_dtype)
        for row in read_rows(records, manifest):
            yield row | {"tokens": len(row["text"]) // width}
        return
    values = memory.read(records, manifest)
    captions = memory.read_captions(records, manifest.examples)
    columns = {
        "id": values["id"],
        "image": map(png, values["image"]),
        "caption": captions,
        "tokens": np.diff(values["offset"]),
        "scores": values.get("scores", np.zeros((len(captions), 0))),
    }
    yield from (dict(zip(columns, row)) for row in zip(*columns.values()))


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
                found = _WORD.findall(caption.lower())
                words.update(found)
                scripts[_scripts(caption)] += 1
                text = _hash(row["caption"]), len(found), row["tokens"]
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
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Unusable("it has too many pixels")
            image.draft("L", (64, 64))
            return width, height, _hash(data), dhash(image)
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
    counts = dict(zip(labels, np.bincount(place, minlength=len(labels)).tolist()))
    filled = labels[place.min() : place.max() + 1]
    quantiles = np.percentile(known, _QUANTILES).tolist()
    return {
        "unknown": len(values) - len(known),
        "counts": {label: counts[label] for label in filled},
        "quantiles": {
            f"{q} %": float(f"{x:.4g}") for q, x in zip(_QUANTILES, quantiles)
        },
    }


def _duplicates(
    kept: np.ndarray,
) -> tuple[dict[str, Any], dict[int, int], list[tuple[int, int]]]:
    """Numbers; places and numbers of frequent captions; places of near pictures."""
    _, files = np.unique(kept["file"], return_index=True)
    _, texts, times = np.unique(kept["caption"], return_index=True, return_counts=True)
    numbers = {
        "equal_files": len(kept) - len(files),
        "equal_captions": len(kept) - len(texts),
    }
    most = np.argsort(-times, kind="stable")[:_FREQUENT]
    captions = {int(texts[i]): int(times[i]) for i in most if times[i] > 1}
    # Of equal files one, sorted by looks; those of equal looks are compared as one.
    files = files[kept["width"][files] > 0]
    files = files[np.argsort(kept["looks"][files], kind="stable")]
    looks, first, same = np.unique(
        kept["looks"][files], return_index=True, return_counts=True
    )
    alike, count = same > 1, int((same * (same - 1) // 2).sum())
    shown = [(place, place + 1) for place in first[alike]][: _PAIRS // 2]
    for a, b in near_pairs(looks):
        count += int((same[a] * same[b]).sum())
        alike[a] = alike[b] = True
        shown += zip(first[a[:_PAIRS]], first[b[:_PAIRS]])
        del shown[_PAIRS:]
    numbers |= {"near_bits": NEAR, "near_pictures": int(same[alike].sum())}
    numbers["near_pairs"] = count
    return numbers, captions, [(int(files[a]), int(files[b])) for a, b in shown]
