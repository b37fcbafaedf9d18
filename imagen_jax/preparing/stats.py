"""What became of the examples: counted shard by shard, summed up, and estimated."""

import collections
import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from imagen_jax.preparing.captions import Embedded, Embedder
from imagen_jax.preparing.images import Rules
from imagen_jax.preparing.sources import Problem, Source, Verified, verify_images

# Examples that an estimate is made from.
_SAMPLE = 64


class Stats:
    """Counts what happens in one shard."""

    def __init__(self):
        self._sides = collections.Counter()
        self._lengths = collections.Counter()
        self._skipped = []
        self._sums = collections.Counter()
        self._error_worst = 0.0

    def usable(
        self, items: Iterable[Verified | Problem], progress: Callable[[int], None]
    ) -> Iterator[Verified]:
        """Counts `items` and yields those that can be used."""
        for item in items:
            progress(1)
            if isinstance(item, Problem):
                self._skipped.append({"file": item.name, "reason": item.reason})
                continue
            self._sides[item.image.side] += 1
            self._sums["reencoded"] += item.image.reencoded
            self._sums["image_bytes"] += len(item.image.data)
            yield item

    def embedded(
        self, items: Iterable[Verified], embedder: Embedder
    ) -> Iterator[tuple[Verified, Embedded]]:
        """Yields `items` with the embeddings of their captions, and counts these."""
        for item, text in embedder.embed_items(items):
            self._lengths[text.tokens] += 1
            self._sums["cut_captions"] += text.cut
            self._sums["text_bytes"] += len(text.data)
            self._sums["error_sum"] += float(text.errors.sum())
            self._error_worst = max(self._error_worst, float(text.errors.max()))
            yield item, text

    def report(self, file: str, sha256: str) -> dict[str, Any]:
        """What happened in the shard that is written to `file`, as JSON values."""
        return {
            "file": file,
            "sha256": sha256,
            "examples": self._sides.total(),
            "sides": {str(side): n for side, n in sorted(self._sides.items())},
            "skipped": self._skipped,
            "reencoded": self._sums["reencoded"],
            "image_bytes": self._sums["image_bytes"],
            "lengths": {str(n): count for n, count in sorted(self._lengths.items())},
            "cut_captions": self._sums["cut_captions"],
            "text_bytes": self._sums["text_bytes"],
            "error_sum": float(self._sums["error_sum"]),
            "error_worst": self._error_worst,
        }


def total(reports: list[dict[str, Any]], problems: list[Problem]) -> dict[str, Any]:
    """Sums the reports on all shards up, in the form that a manifest has.

    Args:
      reports: `Stats.report` of each shard, in order.
      problems: those of the source that belong to no shard.
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
        "shards": [
            {name: report[name] for name in kept}
            for report in reports
            if report["examples"]
        ],
    }


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a job is expected to write.

    Attributes:
      examples: examples that can be used; None if the source does not know.
      exact: whether the source knows exactly how many it has.
      image_bytes: bytes of an image as it is stored, on average.
      text_bytes: bytes of a caption's embedding, on average.
      free_bytes: bytes that are free on the disk of the output.
    """

    examples: int | None
    exact: bool
    image_bytes: float
    text_bytes: float
    free_bytes: int

    def __str__(self) -> str:
        each = self.image_bytes + self.text_bytes
        parts = f"{format_bytes(self.image_bytes)} a picture"
        if self.text_bytes:
            parts += f", {format_bytes(self.text_bytes)} a caption"
        if self.examples is None:
            room = f"{int(self.free_bytes // max(each, 1)):,}"
            return f"estimated: {parts}; the free disk has room for {room} examples"
        total = self.examples * each
        return (
            f"estimated: {format_bytes(total)} for {'' if self.exact else 'about '}"
            f"{self.examples:,} examples ({parts}), "
            f"{format_bytes(self.free_bytes)} free"
            + ("; THIS DOES NOT FIT" if total > self.free_bytes else "")
        )


def estimate(
    source: Source, rules: Rules, embedder: Embedder | None, output: pathlib.Path
) -> Estimate | None:
    """Estimates a job from its first examples; None if none of them can be used.

    Images are decoded and captions are tokenised, but not embedded.
    """
    items = list(verify_images(itertools.islice(source.read(0), _SAMPLE), rules))
    usable = [item for item in items if isinstance(item, Verified)]
    if not usable:
        return None
    captions = [item.caption for item in usable] if embedder else []
    output = output.absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    return Estimate(
        source.count and round(source.count * len(usable) / len(items)),
        source.exact,
        sum(len(item.image.data) for item in usable) / len(usable),
        sum(map(embedder.expected_bytes, captions)) / len(usable) if embedder else 0,
        shutil.disk_usage(there).free,
    )


def format_bytes(count: float) -> str:
    """A number of bytes for people: 1,234 B, 12 kB, 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
