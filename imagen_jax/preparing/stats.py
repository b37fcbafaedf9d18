"""What became of the examples: counted shard by shard, and summed up."""

import collections
import math
from collections.abc import Mapping
from typing import Any

from imagen_jax.preparing.images import StoredImage
from imagen_jax.preparing.sources import Example, Problem, Rest
from imagen_jax.text.embeddings import Embedded

_SUMS = ("reencoded", "image_bytes", "cut_captions", "text_bytes", "scored")
# What a manifest keeps of the report on a file.
_SHARD = ("file", "examples", "sha256", "bytes", "head_sha256", "sides")


class Stats:
    """Counts what happens in one shard."""

    def __init__(self):
        self._skipped, self._holds = [], 0
        self._account = collections.Counter()
        self._sides, self._lengths = collections.Counter(), collections.Counter()
        self._unknown = collections.Counter()
        self._sums = dict.fromkeys(_SUMS, 0) | {"error_sum": 0.0, "error_worst": 0.0}

    def skip(self, problem: Problem) -> None:
        """Counts what cannot be used."""
        self._skipped.append({"file": problem.name, "reason": problem.reason})
        self._account["quarantined"] += problem.parts

    def pass_over(self, rest: Rest) -> None:
        """Counts what is neither an example nor a problem."""
        self._holds += rest.holds
        self._account.update(rest.counts)

    def add(self, example: Example, image: StoredImage, text: Embedded | None) -> None:
        """Counts an example that is stored."""
        sums = self._sums
        self._account["used"] += example.parts
        self._sides[image.side] += 1
        sums["reencoded"] += image.reencoded
        sums["image_bytes"] += len(image.data)
        unknown = {name: math.isnan(value) for name, value in example.scores.items()}
        self._unknown.update(unknown)
        sums["scored"] += not all(unknown.values())
        if text:
            self._lengths[text.tokens] += 1
            sums["cut_captions"] += text.cut
            sums["text_bytes"] += len(text.data)
            sums["error_sum"] += float(text.errors.sum())
            worst = float(text.errors.max(initial=sums["error_worst"]))
            sums["error_worst"] = worst

    def report(self, file: str) -> dict[str, Any]:
        """What happened in the shard that is written to `file`, as JSON values."""
        return {
            "file": file,
            "examples": self._sides.total(),
            "sides": {str(side): n for side, n in sorted(self._sides.items())},
            "lengths": {str(n): count for n, count in sorted(self._lengths.items())},
            "skipped": self._skipped,
            "holds": self._holds,
            "account": self._account,
            "scores": self._unknown,
        } | self._sums


def in_words(account: Mapping[str, int]) -> str:
    """The kinds in an account that are not used, as "2 .ogg, 1 hidden"."""
    kinds = sorted(account.keys() - {"used", "quarantined"})
    return ", ".join(f"{account[kind]:,} {kind}" for kind in kinds)


def total(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums up all reports under a manifest's names."""
    names = ("examples", *_SUMS)
    # Older reports lack the newest.
    sums = {name: sum(report.get(name, 0) for report in reports) for name in names}
    lengths = [item for report in reports for item in report["lengths"].items()]
    tokens = sum(int(n) * count for n, count in lengths)
    mean = sum(report["error_sum"] for report in reports) / max(tokens, 1)
    worst = max(report["error_worst"] for report in reports)
    holds = sum(report.get("holds", 0) for report in reports)
    account = collections.Counter({"used": 0, "quarantined": 0})
    unknown = collections.Counter()
    for report in reports:
        account.update(report.get("account", {}))
        unknown.update(report.get("scores", {}))
    # Of a job that began before there were accounts nobody knows.
    if not all("account" in report for report in reports):
        holds, account = 0, collections.Counter()
    assert account.total() == holds, f"{account} are not {holds}"
    files = [report for report in reports if report["examples"]]
    return sums | {
        "holds": holds,
        "account": dict(sorted(account.items())),
        "scores": dict(unknown),
        "tokens_max": max((int(n) for n, _ in lengths), default=0),
        "tokens_mean": round(tokens / max(sums["examples"], 1), 2),
        # Seven digits are more than a cosine of bfloat16 rows has.
        "cosine_error": {"mean": float(f"{mean:.7g}"), "worst": float(f"{worst:.7g}")},
        "skipped": [row for report in reports for row in report["skipped"]],
        "shards": [{n: file[n] for n in _SHARD if n in file} for file in files],
    }
