import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.data import start_tensorflow
from imagen_jax.data.manifest import read_manifest
from imagen_jax.errors import UserError
from tests import tars
from tests.npz import captions


@pytest.fixture
def pictures(tmp_path):
    """Five pictures with captions beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise {i}" + " more" * 3 * i)
    return folder


def _prepare(source, output, **options):
    return prepare.prepare(str(source), str(output), progress=False, **options)


def _bytes(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", ["out", "out.npz"])
@pytest.mark.parametrize("source", ["folder", "shapes:5"])
def test_equal_input_makes_equal_bytes(pictures, tmp_path, name, source):
    source = f"folder:{pictures}" if source == "folder" else source
    (tmp_path / "again").mkdir()
    outputs = [tmp_path / name, tmp_path / "again" / name]
    for output in outputs:
        _prepare(source, output, image_size=16, shard_examples=2)
    assert _bytes(outputs[0]) == _bytes(outputs[1])
    manifest = read_manifest(outputs[0])
    assert manifest.examples == 5
    assert len(manifest.shards) == (1 if name.endswith("npz") else 3)
    other = tmp_path / f"seed-{name}"
    _prepare(source, other, image_size=16, shard_examples=2, seed=1)
    assert read_manifest(other).content_sha256 != manifest.content_sha256


@pytest.mark.parametrize("source", ["folder", "shapes:5", "parquet"])
def test_three_processes_write_what_one_does(pictures, tmp_path, source):
    if source == "folder":
        source = f"folder:{pictures}"
    elif source == "parquet":
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        files = [(pictures / f"{i}.png").read_bytes() for i in range(5)]
        table = pa.table({"image": files, "text": [f"noise {i}" for i in range(5)]})
        pq.write_table(table, tmp_path / "x.parquet")
        source = f"parquet:{tmp_path}/x.parquet"
    _prepare(source, tmp_path / "one", shard_examples=1)
    for index in (1, 2, 0):
        divided = {"process_index": index, "process_count": 3}
        _prepare(source, tmp_path / "three", shard_examples=1, **divided)
    assert len(_bytes(tmp_path / "one")) == 6 + 2 * 5
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "three")


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_what_is_prepared_already_is_kept(pictures, tmp_path, name, capsys):
    source, output = f"folder:{pictures}", tmp_path / name
    first = _prepare(source, output, image_size=16)
    before = {file: os.stat(file).st_mtime_ns for file in [output]}
    assert prepare.prepare(source, str(output), image_size=16) == first
    assert "already prepared: 5 examples" in capsys.readouterr().out
    assert before == {file: os.stat(file).st_mtime_ns for file in [output]}
    with pytest.raises(UserError, match="was prepared with text_length 128, not 64"):
        _prepare(source, output, image_size=16, text_length=64)
    Image.new("RGB", (30, 30)).save(pictures / "3.png")
    with pytest.raises(UserError, match="prepared with other pictures or captions"):
        _prepare(source, output, image_size=16)
    assert read_manifest(output) == first


@pytest.mark.parametrize("name", ["full", "full.npz"])
def test_outputs_that_hold_something_else(pictures, tmp_path, name):
    (tmp_path / "empty").mkdir()
    _prepare("shapes:2", tmp_path / "empty")
    output = tmp_path / name
    output.mkdir()
    (output / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="was not written by `prepare`"):
        _prepare(f"folder:{pictures}", output)
    assert _bytes(output) == {"thesis.tex": b"..."}


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_broken_pictures_are_skipped_and_named(pictures, tmp_path, name, capsys):
    broken = pictures / "2.png"
    broken.write_bytes(broken.read_bytes()[:-500])
    (pictures / "4.txt").unlink()
    output = tmp_path / name
    manifest = prepare.prepare(f"folder:{pictures}", str(output), image_size=16)
    assert (manifest.examples, manifest.skipped) == (3, 2)
    reasons = {skip["file"]: skip["reason"] for skip in manifest.skipped_files}
    assert reasons["4.png"] == "has no .txt or .caption file beside it"
    assert "truncated" in reasons["2.png"].lower()
    out = capsys.readouterr().out
    assert "; 2 skipped" in out and "2.png: " in out


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_mostly_broken_sources_write_nothing(pictures, tmp_path, name):
    for i in range(3):
        (pictures / f"{i}.png").write_bytes(b"?")
    message = "3 of 5 examples .* '[012].png': it is no picture of a known format"
    with pytest.raises(UserError, match=message):
        _prepare(f"folder:{pictures}", tmp_path / name, image_size=16)
    for i in range(3, 5):
        (pictures / f"{i}.png").write_bytes(b"?")
    with pytest.raises(UserError, match="5 of 5 examples"):
        _prepare(f"folder:{pictures}", tmp_path / f"2{name}", image_size=16)
    # The finished shards are kept, but nothing that training would read.
    with pytest.raises(UserError, match="half-written|there is no"):
        read_manifest(tmp_path / f"2{name}")
    if name == "out":
        lines = (tmp_path / f"2{name}" / "quarantine.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["file"][0] for line in lines) == list("01234")


def test_the_share_that_may_be_bad(pictures, tmp_path):
    (pictures / "0.png").write_bytes(b"?")
    with pytest.raises(UserError, match="1 of 5 examples .*--max_bad_share=0.1"):
        _prepare(f"folder:{pictures}", tmp_path / "out", max_bad_share=0.1)
    # Not a property of the records: what is finished is kept.
    manifest = _prepare(f"folder:{pictures}", tmp_path / "out", max_bad_share=0.2)
    assert (manifest.examples, manifest.skipped) == (4, 1)


def test_pictures_smaller_than_a_npz(pictures, tmp_path):
    manifest = _prepare(f"folder:{pictures}", tmp_path / "out.npz", image_size=22)
    assert (manifest.examples, manifest.skipped) == (3, 2)
    reasons = {skip["file"]: skip["reason"] for skip in manifest.skipped_files}
    assert reasons["0.png"] == "its shorter side has 20 of 22 pixels"


def test_cut_captions_are_counted(pictures, tmp_path, capsys):
    # 3, 6, 9, 12 and 15 tokens with the end.
    manifest = prepare.prepare(f"folder:{pictures}", str(tmp_path / "o"), text_length=9)
    assert (manifest.cut_captions, manifest.tokens_max) == (2, 9)
    assert manifest.tokens_mean == (3 + 6 + 9 + 9 + 9) / 5
    assert "(2 cut" in capsys.readouterr().out


@pytest.mark.slow
def test_the_estimate(tmp_path, capsys):
    """It is near what is written, and does not change it."""
    options = {"image_size": 16, "text_length": 8}
    manifest = prepare.prepare("shapes:300", str(tmp_path / "a"), **options)
    said = capsys.readouterr().out.splitlines()[0]
    want = r"estimated: (\S+)B an example, (\S+)kB for 300"
    each, whole = map(float, re.fullmatch(want, said).groups())
    written = manifest.image_bytes + manifest.text_bytes
    # A mean of 64, whose deviation is below a half of it.
    assert abs(whole * 1000 / written - 1) < 4 * 0.5 / 64**0.5
    assert abs(each * 300 / (whole * 1000) - 1) < 0.01
    _prepare("shapes:300", tmp_path / "b", **options)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    tars.write(tmp_path / "0.tar", [("0.png", b"broken"), ("0.txt", b"x")])
    with pytest.raises(UserError, match="1 of 1 examples"):
        prepare.prepare(f"webdataset:{tmp_path}/*.tar", str(tmp_path / "c"))
    assert capsys.readouterr().out.startswith("estimated: ")


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_sources_with_nothing_to_use(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(UserError, match="pictures' has no examples; taken are"):
        prepare.prepare(f"folder:{folder}", str(tmp_path / name))
    (folder / "a.txt").write_text("alone")
    with pytest.raises(UserError, match="1 of 1 .* first 'a.txt': has a caption, but"):
        prepare.prepare(f"folder:{folder}", str(tmp_path / f"2{name}"))


def test_shapes_are_the_scenes_of_their_captions(tmp_path):
    from imagen_jax.shapes import scenes as shapes

    _prepare("shapes:4", tmp_path / "s.npz", image_size=32, seed=3)
    with np.load(tmp_path / "s.npz") as file:
        images = file["image"]
    texts = captions(tmp_path / "s.npz")
    for scene, image, caption in zip(shapes.generate(4, 3), images, texts):
        assert shapes.caption(scene) == caption
        np.testing.assert_array_equal(shapes.draw(scene, 32), image)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "foldr:x"}, "'foldr:x'; it is folder:"),
        ({"source": "folder:"}, "it is folder:DIR, webdataset:GLOB, .* or wordings:N"),
        ({"source": "shapes:many"}, "give a number above zero"),
        ({"source": "folder:/no/where"}, "there is no folder '/no/where'"),
        ({"output": ""}, "--output='' is no folder"),
        ({"encoder": "tny"}, "did you mean 'tiny'"),
        ({"text_length": 0}, "--text_length is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"shard_examples": -1}, "--shard_examples is -1"),
        ({"min_side": 0}, "--min_side is 0"),
        ({"stored_size": -2}, "--stored_size is -2"),
        ({"max_pixels": 0}, "--max_pixels is 0"),
        (
            {"stored_size": 8, "output": "out.npz"},
            "--stored_size is below --image_size",
        ),
        ({"max_bad_share": -0.5}, "--max_bad_share is -0.5; give at least 0"),
        ({"embedding_dtype": "int9"}, r"'int9' \(did you mean 'int8'\?\)"),
        ({"process_index": 1}, "give --process_index=I and --process_count"),
        ({"process_index": 2, "process_count": 2}, "with I < N"),
        (
            {"output": "x.npz", "process_index": 0, "process_count": 2},
            "needs one process and",
        ),
        ({"output": "x.npz", "encoder": "none"}, "and an --encoder"),
        ({"output": "gs://bucket/records"}, "mount a bucket"),
        ({"runner": "DirectRunner"}, "--runner needs --encoder=none"),
        ({"source": "webdataset:/no/*.tar"}, "no tar matches '/no/.*'"),
        ({"source": "parquet:/no/*"}, "no Parquet file matches"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    arguments = {"source": "shapes:3", "output": str(tmp_path / "out")} | options
    with pytest.raises(UserError, match=message):
        prepare.prepare(**arguments, progress=False)
    assert not any(tmp_path.iterdir())


def _run(*arguments):
    command = [sys.executable, "-m", "imagen_jax.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_door(pictures, tmp_path):
    output = tmp_path / "out"
    done = _run(f"--source=folder:{pictures}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "prepared 5 examples" in done.stdout
    # The bar and nothing of TensorFlow's.
    assert "5/5" in done.stderr and "oneDNN" not in done.stderr
    lines = json.loads((output / "manifest.json").read_text())
    assert lines["examples"] == 5


def test_the_door_refuses(tmp_path):
    wrong = _run("--source=shapes:0", f"--output={tmp_path / 'out'}")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: --source") and wrong.stderr.count("\n") == 1


# What becomes of images and captions that are not as they should be.


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
    "PNG without its end": ("png", PNG[:-12], b"x", (40, "pixels", "x")),
    "EPS": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"x", "it is no picture of a known"),
    "TIFF": ("png", _file(RED, "TIFF"), b"x", "it is no picture of a known format"),
    "enormous": (
        "png",
        _file(Image.new("1", (14_000, 10_000))),
        b"x",
        "14000 by 10000 pixels are more than --max_pixels=128000000",
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
        max_bad_share=0.9,
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
    elif colour == "pixels":
        start_tensorflow()
        from imagen_jax.data import preprocess

        assert stored != file
        np.testing.assert_array_equal(preprocess.decode(stored), _noise(40, 50, 3))
    else:
        pixels = np.asarray(Image.open(io.BytesIO(stored)), int)
        # CMYK is a JPEG's, with its losses.
        assert pixels.shape == (40, 50, 3) and np.abs(pixels - colour).max() < 6


def test_everything_is_counted(outcome):
    manifest, reasons, records = outcome
    assert manifest.examples == len(records) and manifest.skipped == len(reasons)
    assert manifest.examples + manifest.skipped == len(CASES)
    assert manifest.reencoded == 5 and manifest.cut_captions == 1
