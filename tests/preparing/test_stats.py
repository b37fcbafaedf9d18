import json
import math

import numpy as np
import pytest

from imagen_jax.preparing.images import StoredImage
from imagen_jax.preparing.sources import Example, Problem, Rest
from imagen_jax.preparing.stats import Stats, total
from imagen_jax.text.embeddings import Embedded


def test_totals():
    """Two shards by hand, one of them empty."""
    images = [StoredImage(b"123", 8, False), StoredImage(b"4567", 9, True)]
    texts = [
        Embedded(b"1234", 2, False, np.array([0.0, 0.25])),
        Embedded(b"12", 1, True, np.array([0.5])),
    ]
    full, empty = Stats(), Stats()
    scores = [{"a": 1.0, "b": 0.0}, {"a": math.nan, "b": 0.5}]
    for image, text, parts, own in zip(images, texts, (2, 1), scores):
        full.add(Example(0, "", "", bytes, parts, own), image, text)
    empty.skip(Problem("a", "why", 3))
    full.pass_over(Rest(3))
    empty.pass_over(Rest(7, {".ogg": 4}))
    reports = [full.report("0") | {"sha256": "x"}, empty.report("1")]
    assert json.loads(json.dumps(reports)) == reports
    beside = Stats()
    beside.skip(Problem("b", "other"))
    beside.pass_over(Rest(1))
    done = total([beside.report(""), *reports])
    assert done == {
        "examples": 2,
        "holds": 11,
        "account": {".ogg": 4, "quarantined": 4, "used": 3},
        "reencoded": 1,
        "image_bytes": 7,
        "text_bytes": 6,
        "cut_captions": 1,
        "scores": {"a": 1, "b": 0},
        "scored": 2,
        "tokens_max": 2,
        "tokens_mean": 1.5,
        "cosine_error": {"mean": 0.25, "worst": 0.5},
        "skipped": [
            {"file": "b", "reason": "other"},
            {"file": "a", "reason": "why"},
        ],
        "shards": [
            {
                "file": "0",
                "examples": 2,
                "sha256": "x",
                "sides": {"8": 1, "9": 1},
            }
        ],
    }


def test_an_account_that_does_not_add_up():
    stats = Stats()
    stats.pass_over(Rest(2, {"hidden": 1}))
    with pytest.raises(AssertionError, match="are not 2"):
        total([stats.report("0")])
    # Reports of a version that did not count.
    old = {k: v for k, v in stats.report("0").items() if k not in ("holds", "account")}
    done = total([old, stats.report("1")])
    assert (done["holds"], done["account"]) == (0, {})
