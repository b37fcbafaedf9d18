"""What becomes of pictures and captions that are not as they should be."""

import io

import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.data.start_tensorflow import start_tensorflow
from tests import tars


def _file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


JPEG = _file(Image.fromarray(_noise(40, 50, 3)), "JPEG")
PNG = _file(Image.fromarray(_noise(40, 50, 3)))
RED = Image.new("RGB", (50, 40), "red")
DEEP = np.full((40, 50), 40_000, np.uint16)
HALF_RED = Image.new("RGBA", (50, 40), (255, 0, 0, 128))
GIF = _file(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (50, 40))])

# Name: extension, picture's file, caption's file, and what becomes of it: a reason of
# the quarantine, or the side, the colour (None: as in the file) and the caption.
CASES = {
    "plain": ("jpg", JPEG, b"one", (40, None, "one")),
    "truncated JPEG": ("jpg", JPEG[:-400], b"x", "OSError: image file is truncated"),
    "wrong extension": ("jpg", PNG, b"x", (40, None, "x")),
    "no picture": ("png", b"<html>", b"x", "it is no picture of a known format"),
    "CMYK": (
        "jpg",
        _file(Image.new("CMYK", (50, 40), (0, 255, 255, 0)), "JPEG"),
        b"x",
        (40, (255, 0, 0), "x"),
    ),
    "16 bit": ("png", _file(Image.fromarray(DEEP)), b"x", (40, (155,) * 3, "x")),
    "alpha": ("png", _file(HALF_RED), b"x", (40, (255, 127, 127), "x")),
    "animated GIF": ("gif", GIF, b"x", (40, (255, 0, 0), "x")),
    "1x1": ("png", _file(RED.resize((1, 1))), b"x", "its shorter side has 1 of 8"),
    "20000x10": (
        "png",
        _file(RED.resize((20_000, 10))),
        b"x",
        "20000 by 10 pixels are more than 50 to 1",
    ),
    "not UTF-8": ("jpg", JPEG, b"caf\xe9", "the caption is not UTF-8 text"),
    "empty": ("jpg", JPEG, b" \n", "the caption is empty"),
    "10,000 words": (
        "jpg",
        JPEG,
        b"word " * 10_000,
        (40, None, "word " * 9999 + "word"),
    ),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The manifest, the reasons and the records by name."""
    folder = tmp_path_factory.mktemp("selection")
    members = []
    for name, (extension, image, caption, _) in CASES.items():
        members += [(f"{name}.{extension}", image), (f"{name}.txt", caption)]
    tars.write(folder / "a.tar", members)
    manifest = prepare.prepare(
        f"webdataset:{folder}/a.tar",
        str(folder / "out"),
        text_length=16,
        min_side=8,
        max_aspect=50,
        progress=False,
    )
    start_tensorflow()
    import tensorflow as tf

    names, records = list(CASES), {}
    data = tf.data.TFRecordDataset(str(folder / "out" / "records-00000.tfrecord"))
    for row in data.as_numpy_iterator():
        feature = tf.train.Example.FromString(row).features.feature
        records[names[feature["id"].int64_list.value[0]]] = (
            feature["side"].int64_list.value[0],
            feature["image"].bytes_list.value[0],
            feature["caption"].bytes_list.value[0].decode(),
        )
    reasons = {
        skip["file"].removeprefix("a.tar/"): skip["reason"]
        for skip in manifest.skipped_files
    }
    return manifest, reasons, records


@pytest.mark.parametrize("name", CASES)
def test_outcomes(outcome, name):
    _, reasons, records = outcome
    _, file, _, want = CASES[name]
    if isinstance(want, str):
        assert reasons[name].startswith(want) and name not in records
        return
    side, colour, caption = want
    have_side, stored, have_caption = records[name]
    assert (have_side, have_caption) == (side, caption) and name not in reasons
    if colour is None:
        assert stored == file
    else:
        pixels = np.asarray(Image.open(io.BytesIO(stored)), int)
        # CMYK is a JPEG's, with its losses.
        assert pixels.shape == (40, 50, 3) and np.abs(pixels - colour).max() < 6


def test_everything_is_counted(outcome):
    manifest, reasons, records = outcome
    assert manifest.examples == len(records) and manifest.skipped == len(reasons)
    assert manifest.examples + manifest.skipped == len(CASES)
    assert manifest.reencoded == 4 and manifest.cut_captions == 1
