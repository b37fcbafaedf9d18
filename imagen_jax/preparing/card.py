"""A data card: what is in records, counted in one pass over them."""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from imagen_jax.data import memory, start_tensorflow
from imagen_jax.data.manifest import Manifest, read_manifest
from imagen_jax.errors import UserError
from imagen_jax.images import Unusable, opened, png
from imagen_jax.preparing.card_page import Shown, page
from imagen_jax.preparing.duplicates import NEAR, dhash, near_pairs
from imagen_jax.preparing.images import MAX_PIXELS
from imagen_jax.text import embeddings

# Records in memory at a time, decoded in several threads.
_CHUNK = 256
# Different words that are counted; when there are more, the rarer half is forgotten.
_MOST_WORDS = 2**20
# On the page.
_WORDS, _CAPTIONS, _PAIRS, _PICTURES = 100, 5, 12, 24
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_QUANTILES = {"least": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95}
_QUANTILES["most"] = 100
# Borders of the ranges that are counted.
_SIDES = (32, 64, 128, 256, 512, 1024, 2048)
_ASPECTS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
_LENGTHS = (1, 3, 6, 11, 21, 41, 81)
_RANGES = 10  # of a score
# What is kept of each record to the end; hashes have 64 bits.
_ROW = [("id", "i8"), ("width", "i4"), ("height", "i4"), ("file", "u8")]
_ROW += [("looks", "u8"), ("caption", "u8"), ("words", "i4"), ("tokens", "i4")]


def write_card(records: str) -> tuple[epath.Path, dict[str, Any]]:
    """Writes card.html and card.json into a folder of records, or beside a .npz file.

    Returns:
      the path of the page, and the content of card.json.
    """
    manifest = read_manifest(records)
    card, captions, pairs = _count(records, manifest)
    spread = np.linspace(0, manifest.examples - 1, _PICTURES).astype(int).tolist()
    shown = _show(records, manifest, {*spread, *captions, *itertools.chain(*pairs)})
    card["duplicates"]["most_frequent_captions"] = [
        [shown[place].caption, count] for place, count in captions.items()
    ]
    card["duplicates"]["near_pairs"] = [[shown[i].id for i in pair] for pair in pairs]
    path = epath.Path(records)
    start = path / "card" if path.is_dir() else path.with_suffix(".card")
    texts = {
        ".html": page(card, map(shown.get, spread), [map(shown.get, p) for p in pairs]),
        ".json": json.dumps(card, indent=1, ensure_ascii=False) + "\n",
    }
    for ending, text in texts.items():
        epath.Path(f"{start}{ending}").write_text(text)
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
    tokens = np.diff(values["offset"])
    scores = values.get("scores", np.zeros((len(tokens), 0)))
    for i, caption in enumerate(captions):
        row = {"id": int(values["id"][i]), "image": png(values["image"][i])}
        yield row | {"caption": caption, "tokens": tokens[i], "scores": scores[i]}


def _count(
    records: str, manifest: Manifest
) -> tuple[dict[str, Any], dict[int, int], list[tuple[int, int]]]:
    """The card, places and numbers of frequent captions, places of near pictures."""
    kept = np.zeros(
        manifest.examples, [*_ROW, ("scores", "f4", (len(manifest.scores),))]
    )
    words, scripts = collections.Counter(), collections.Counter()
    rows, place = itertools.islice(_rows(records, manifest), len(kept)), 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            looks = pool.map(_look, [row["image"] for row in chunk])
            for row, look in zip(chunk, looks):
                caption = row["caption"].decode("utf8", "replace")
                found = _WORD.findall(caption.lower())
                words.update(found)
                scripts[_scripts(caption)] += 1
                text = _hash(row["caption"]), len(found), row["tokens"]
                kept[place] = (row["id"], *look, *text, row["scores"])
                place += 1
            if len(words) > _MOST_WORDS:
                words = collections.Counter(dict(words.most_common(_MOST_WORDS // 2)))
    if place < len(kept):
        raise UserError(f"{records!r} has only {place} of {len(kept)} records")
    good = kept[kept["width"] > 0]
    duplicates, captions, pairs = _duplicates(kept)
    card = {
        "examples": manifest.examples,
        "image_bytes": manifest.image_bytes,
        "not_decoded": len(kept) - len(good),
        "source": _source(manifest),
        "shorter_side": _measure(np.minimum(good["width"], good["height"]), _SIDES),
        "aspect": _measure(good["width"] / np.maximum(good["height"], 1), _ASPECTS),
        "words": _measure(kept["words"], _LENGTHS),
        "tokens": _measure(kept["tokens"], _LENGTHS),
        "scripts": dict(scripts.most_common()),
        "frequent_words": dict(words.most_common(_WORDS)),
        "duplicates": duplicates,
        "scores": {
            name: _measure(kept["scores"][:, k])
            for k, name in enumerate(manifest.scores)
        },
    }
    return card, captions, pairs


def _source(manifest: Manifest) -> dict[str, Any]:
    return manifest.settings | {
        "source_sha256": manifest.source_sha256,
        "content_sha256": manifest.content_sha256,
        "encoder": manifest.encoder,
        "embedding_dtype": manifest.embedding_dtype,
        "cut_captions": manifest.cut_captions,
        "holds": manifest.holds,
        "account": manifest.account,
    }


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
        return {"unknown": len(values), "quantiles": {}, "counts": {}}
    if not edges:
        edges = np.histogram_bin_edges(known.astype(float), _RANGES)[1:-1].tolist()
    step, form = (1, ",d") if values.dtype.kind == "i" else (0, ".3g")
    between = [f"{a:{form}} to {b - step:{form}}" for a, b in itertools.pairwise(edges)]
    labels = [f"under {edges[0]:{form}}", *between, f"{edges[-1]:{form}} or more"]
    place = np.searchsorted(edges, known, "right")
    counts = np.bincount(place, minlength=len(labels)).tolist()
    filled = slice(place.min(), place.max() + 1)
    quantiles = np.percentile(known, list(_QUANTILES.values())).tolist()
    return {
        "unknown": len(values) - len(known),
        "quantiles": {n: float(f"{x:.4g}") for n, x in zip(_QUANTILES, quantiles)},
        "counts": dict(zip(labels[filled], counts[filled])),
    }


def _duplicates(
    kept: np.ndarray,
) -> tuple[dict[str, Any], dict[int, int], list[tuple[int, int]]]:
    """Numbers; places and numbers of frequent captions; places of near pictures."""
    _, files = np.unique(kept["file"], return_index=True)
    _, texts, times = np.unique(kept["caption"], return_index=True, return_counts=True)
    most = np.argsort(-times, kind="stable")[:_CAPTIONS]
    # Of equal files one, of equal looks as well.
    files = files[kept["width"][files] > 0]
    looks, first, same = np.unique(
        kept["looks"][files], return_index=True, return_counts=True
    )
    alike, pairs = same > 1, int((same * (same - 1) // 2).sum())
    order = np.argsort(kept["looks"][files], kind="stable")
    equal = np.flatnonzero(np.diff(kept["looks"][files][order]) == 0)
    shown = [*zip(order[equal], order[equal + 1])][: _PAIRS // 2]
    for a, b in near_pairs(looks):
        pairs += int((same[a] * same[b]).sum())
        alike[a] = alike[b] = True
        shown += zip(first[a], first[b])
        del shown[_PAIRS:]
    numbers = {
        "equal_files": len(kept) - len(np.unique(kept["file"])),
        "equal_captions": len(kept) - len(times),
        "near_bits": NEAR,
        "near_pictures": int(same[alike].sum()),
        "number_of_near_pairs": pairs,
    }
    captions = {int(texts[i]): int(times[i]) for i in most if times[i] > 1}
    return numbers, captions, [(int(files[a]), int(files[b])) for a, b in shown]


def _show(
    records: str, manifest: Manifest, places: Iterable[int]
) -> Mapping[int, Shown]:
    """What is shown of the records at `places`."""
    return {
        place: Shown.of(row["id"], row["image"], row["caption"])
        for place, row in enumerate(_rows(records, manifest))
        if place in places
    }
