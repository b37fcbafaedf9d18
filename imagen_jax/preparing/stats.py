"""What became of the examples: counted shard by shard, summed up, and estimated."""

import collections
import functools
import itertools
import pathlib
import shutil
from typing import Any

import tqdm

from imagen_jax.preparing.captions import Embedded, Embedder
from imagen_jax.preparing.images import Rules, StoredImage
from imagen_jax.preparing.sources import Problem, Source, verify_images

# Examples that an estimate is made from.
_SAMPLE = 64

format_bytes = functools.partial(tqdm.tqdm.format_sizeof, suffix="B")


class Stats:
    """Counts what happens in one shard."""

    def __init__(self):
        self._skipped = []
        self._sides, self._lengths = collections.Counter(), collections.Counter()
        self._sums = {"reencoded": 0, "image_bytes": 0}
        self._sums |= {"cut_captions": 0, "text_bytes": 0}
        self._sums |= {"error_sum": 0.0, "error_worst": 0.0}

    def skip(self, problem: Problem) -> None:
        """Counts what cannot be used."""
        self._skipped.append({"file": problem.name, "reason": problem.reason})

    def add(self, image: StoredImage, text: Embedded | None) -> None:
        """Counts an example that is stored."""
        sums = self._sums
        self._sides[image.side] += 1
        sums["reencoded"] += image.reencoded
        sums["image_bytes"] += len(image.data)
        if text:
            self._lengths[text.tokens] += 1
            sums["cut_captions"] += text.cut
            sums["text_bytes"] += len(text.data)
            sums["error_sum"] += float(text.errors.sum())
            sums["error_worst"] = max(sums["error_worst"], float(text.errors.max()))

    def report(self, file: str, sha256: str) -> dict[str, Any]:
        """What happened in the shard that is written to `file`, as JSON values."""
        return {
            "file": file,
            "sha256": sha256,
            "examples": self._sides.total(),
            "sides": {str(side): n for side, n in sorted(self._sides.items())},
            "lengths": {str(n): count for n, count in sorted(self._lengths.items())},
            "skipped": self._skipped,
        } | self._sums


def total(reports: list[dict[str, Any]], problems: list[Problem]) -> dict[str, Any]:
    """Sums up the reports on all shards and the problems that belong to none.

    The result has the names and the form of a manifest.
    """
    skipped = [{"file": problem.name, "reason": problem.reason} for problem in problems]
    for report in reports:
        skipped += report["skipped"]
    names = ("examples", "reencoded", "image_bytes", "text_bytes", "cut_captions")
    sums = {name: sum(report[name] for report in reports) for name in names}
    lengths = [
        (int(n), count) for report in reports for n, count in report["lengths"].items()
    ]
    tokens = sum(n * count for n, count in lengths)
    mean = sum(report["error_sum"] for report in reports) / max(tokens, 1)
    worst = max((report["error_worst"] for report in reports), default=0)
    kept = ("file", "examples", "sha256", "sides", "lengths")
    return sums | {
        "tokens_max": max((n for n, _ in lengths), default=0),
        "tokens_mean": round(tokens / max(sums["examples"], 1), 2),
        # Seven digits are more than a cosine of bfloat16 rows has.
        "cosine_error": {"mean": float(f"{mean:.7g}"), "worst": float(f"{worst:.7g}")},
        "skipped": skipped,
        "shards": [{key: r[key] for key in kept} for r in reports if r["examples"]],
    }


def estimate(
    source: Source, rules: Rules, embedder: Embedder | None, output: pathlib.Path
) -> str:
    """One line about what a job will write, judged by its first examples."""
    items = list(verify_images(itertools.islice(source.read(0), _SAMPLE), rules))
    usable = [item for item in items if not isinstance(item, Problem)]
    if not usable:
        return f"the first {len(items)} examples cannot be used"
    each = sum(len(image.data) for _, image in usable) / len(usable)
    parts = f"{format_bytes(each)} a picture"
    if embedder:
        text = sum(embedder.expected_bytes(e.caption) for e, _ in usable) / len(usable)
        each += text
        parts += f", {format_bytes(text)} a caption"
    output = output.absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if source.count is None:
        room = f"{free / each:,.0f}"
        return f"estimated: {parts}; the free disk has room for {room} examples"
    count = round(source.count * len(usable) / len(items))
    total, fits = count * each, count * each <= free
    return (
        f"estimated: {format_bytes(total)} for about {count:,} examples ({parts}), "
        f"{format_bytes(free)} free" + ("" if fits else "; THIS DOES NOT FIT")
    )
