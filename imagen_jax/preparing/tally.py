"""Counts of what became of the examples, per shard and together."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from imagen_jax.preparing.captions import Embedded
from imagen_jax.preparing.selection import Chosen
from imagen_jax.preparing.sources import Problem


class Tally:
    """Counts what happens in one shard."""

    def __init__(self):
        self._sides = collections.Counter()
        self._lengths = collections.Counter()
        self._skipped = []
        self._reencoded = self._image_bytes = 0
        self._cut = self._text_bytes = 0
        self._error_sum = self._error_worst = 0.0

    def chosen(
        self,
        items: Iterable[Chosen | Problem],
        progress: Callable[[int], None] = lambda examples: None,
    ) -> Iterator[Chosen]:
        """Counts `items` and yields those that can be used."""
        for item in items:
            progress(1)
            if isinstance(item, Problem):
                self._skipped.append({"file": item.name, "reason": item.reason})
                continue
            self._sides[item.picture.side] += 1
            self._reencoded += item.picture.reencoded
            self._image_bytes += len(item.picture.data)
            yield item

    def add_text(self, text: Embedded) -> None:
        """Counts the embedding of an example."""
        self._lengths[text.tokens] += 1
        self._cut += text.cut
        self._text_bytes += len(text.data)
        self._error_sum += float(text.errors.sum())
        self._error_worst = max(self._error_worst, float(text.errors.max()))

    def report(self, file: str, sha256: str) -> dict[str, Any]:
        """What happened in the shard that is written to `file`; JSON knows it all."""
        return {
            "file": file,
            "sha256": sha256,
            "examples": sum(self._sides.values()),
            "sides": {str(side): n for side, n in sorted(self._sides.items())},
            "skipped": self._skipped,
            "reencoded": self._reencoded,
            "image_bytes": self._image_bytes,
            "lengths": {str(n): count for n, count in sorted(self._lengths.items())},
            "cut_captions": self._cut,
            "text_bytes": self._text_bytes,
            "error_sum": self._error_sum,
            "error_worst": self._error_worst,
        }


def total(reports: list[dict[str, Any]], problems: list[Problem]) -> dict[str, Any]:
    """The reports on shards as one, in the form in which a manifest has it.

    Args:
      reports: `Tally.report` of shards, in order.
      problems: of the source besides.
    """
    skipped = [{"file": problem.name, "reason": problem.reason} for problem in problems]
    for report in reports:
        skipped += report["skipped"]
    sums = {
        name: sum(report[name] for report in reports)
        for name in ("examples", "reencoded", "image_bytes", "text_bytes")
    }
    lengths = [
        (int(n), count) for report in reports for n, count in report["lengths"].items()
    ]
    tokens = sum(n * count for n, count in lengths)
    error = sum(report["error_sum"] for report in reports)
    names = ("file", "examples", "sha256", "sides", "lengths")
    shards = [
        {name: report[name] for name in names}
        for report in reports
        if report["examples"]
    ]
    return sums | {
        "tokens_max": max((n for n, _ in lengths), default=0),
        "tokens_mean": round(tokens / max(sums["examples"], 1), 2),
        "cut_captions": sum(report["cut_captions"] for report in reports),
        # Seven digits are more than a cosine of bfloat16 rows has.
        "cosine_error": {
            "mean": float(f"{error / max(tokens, 1):.7g}"),
            "worst": float(
                f"{max((report['error_worst'] for report in reports), default=0):.7g}"
            ),
        },
        "skipped": skipped,
        "shards": shards,
    }
