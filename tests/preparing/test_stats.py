import dataclasses
import json
import re

import numpy as np

from imagen_jax import prepare
from imagen_jax.preparing.captions import Embedded, Embedder
from imagen_jax.preparing.images import Rules, StoredImage, encode_png
from imagen_jax.preparing.job import open_source
from imagen_jax.preparing.sources import Problem
from imagen_jax.preparing.stats import Stats, estimate, total
from imagen_jax.text import encoders
from tests import tars

RULES = Rules()


def _embedder():
    return Embedder(encoders.load_encoder("tiny"), 8, "int8")


def _bytes(text):
    """1.23kB to 1230."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1}
    unit = next(unit for unit in units if text.endswith(unit))
    return float(text.removesuffix(unit)) * units[unit]


def test_near_what_is_written(tmp_path):
    line = estimate(
        open_source("shapes:300", 16, 0, 1000), RULES, _embedder(), tmp_path
    )
    manifest = prepare.prepare(
        "shapes:300",
        str(tmp_path / "out"),
        text_length=8,
        embedding_dtype="int8",
        image_size=16,
        progress=False,
    )
    total, image, text = re.fullmatch(
        r"estimated: (\S+) for about 300 examples "
        r"\((\S+) a picture, (\S+) a caption\), \S+ free",
        line,
    ).groups()
    # A mean of 64, whose deviation is below a half of it.
    for mean, written in (
        (image, manifest.image_bytes),
        (text, manifest.text_bytes),
        (total, 300 * (manifest.image_bytes + manifest.text_bytes)),
    ):
        assert abs(300 * _bytes(mean) / written - 1) < 4 * 0.5 / 64**0.5


def test_of_tars_the_number_is_estimated(tmp_path):
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    members = [
        member
        for i in range(8)
        for member in ((f"{i}.png", png if i % 2 else b""), (f"{i}.txt", b"x"))
    ]
    tars.write(tmp_path / "0.tar", members)
    source = open_source(f"webdataset:{tmp_path}/*.tar", 8, 0, 1)
    line = estimate(source, RULES, _embedder(), tmp_path / "none" / "yet")
    # Half of the eight images in the only tar are broken. "x" and the end are two
    # tokens, each 64 int8 and a scale.
    each = f"({len(png)}.0B a picture, {2 * 68}B a caption)"
    assert f" for about 4 examples {each}" in line


def test_says_that_it_does_not_fit(tmp_path):
    source = open_source("shapes:9", 8, 0, 9)
    huge = dataclasses.replace(source, count=10**15)
    assert estimate(huge, RULES, None, tmp_path).endswith("; THIS DOES NOT FIT")
    unknown = dataclasses.replace(source, count=None)
    line = estimate(unknown, RULES, None, tmp_path)
    assert re.search(r"the free disk has room for [\d,]+ examples$", line)
    nothing = Rules(min_side=9)
    line = estimate(source, nothing, None, tmp_path)
    assert line == "the first 9 examples cannot be used"


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
    reports = [full.report("0", "x"), empty.report("1", "y")]
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
                "lengths": {"1": 1, "2": 1},
            }
        ],
    }
