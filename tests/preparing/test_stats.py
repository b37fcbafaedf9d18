import json

import numpy as np

from imagen_jax.preparing.images import StoredImage
from imagen_jax.preparing.sources import Problem
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
    for image, text in zip(images, texts):
        full.add(image, text)
    empty.skip(Problem("a", "why"))
    reports = [full.report("0") | {"sha256": "x"}, empty.report("1")]
    assert json.loads(json.dumps(reports)) == reports
    done = total(reports, [Problem("b", "other")])
    assert done == {
        "examples": 2,
        "reencoded": 1,
        "image_bytes": 7,
        "text_bytes": 6,
        "cut_captions": 1,
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
