import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from imagen_jax.data import manifest as manifests
from imagen_jax.data.manifest import read_manifest, with_text
from imagen_jax.errors import UserError


@pytest.fixture
def copy(records, tmp_path):
    return pathlib.Path(shutil.copytree(records, tmp_path / "copy"))


def _edit(folder, **changes):
    """Sets or, with `...`, removes entries."""
    file = folder / "manifest.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def test_says_what_was_prepared(records, npz):
    manifest = read_manifest(records)
    assert (manifest.examples, manifest.skipped) == (21, 0)
    assert (manifest.encoder, manifest.text_dim) == ("tiny@v2-seed0-2x64", 64)
    # "picture 3, so so so" and the end; "picture 0," and the end.
    assert (manifest.text_length, manifest.tokens_max) == (8, 8)
    assert manifest.tokens_mean == round((21 * 4 + 40) / 21, 2)
    assert [shard["examples"] for shard in manifest.shards] == [5, 5, 5, 5, 1]
    assert sum(manifest.large_enough(32)) == 15 and sum(manifest.large_enough(31)) == 18
    small = read_manifest(npz)
    assert (small.examples, small.skipped) == (15, 6)
    assert small.skipped_files[0]["reason"].endswith("of 32 pixels")


def test_content_hash_is_of_the_content(records, copy):
    assert read_manifest(copy).content_sha256 == read_manifest(records).content_sha256
    _edit(copy, encoder="tiny@v2")
    assert read_manifest(copy).content_sha256 != read_manifest(records).content_sha256


@pytest.mark.parametrize("values", [(0, 0, ""), (8, 64, "tiny@v2-seed0-2x64")])
def test_text_is_that_of_the_records(records, unresolved, values):
    text = dict(zip(("length", "dim", "encoder"), values))
    cfg = with_text(unresolved(records, text=text), read_manifest(records))
    assert dataclasses.astuple(cfg.text) == (8, 64, "tiny@v2-seed0-2x64")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"encoder": "other@1"}, "text.encoder is 'other@1', .* have 'tiny@.* to ''"),
        ({"dim": 32}, "text.dim is 32, the records .* have 64: set it to 0 "),
        # A caption cut at 4 has other embeddings than the first 4 of 8 tokens.
        ({"length": 4}, "text.length is 4, the records .* have 8: set it to 0 "),
        ({"length": 128}, "text.length is 128, the records .* have 8"),
    ],
)
def test_other_text_is_refused(records, unresolved, text, message):
    cfg = unresolved(records, text={"length": 0, "dim": 0} | text)
    with pytest.raises(UserError, match=message):
        with_text(cfg, read_manifest(records))


def test_round_trip(records):
    manifest = read_manifest(records)
    values = json.loads(manifests.to_json(manifest))
    assert manifests.from_values(values, "x") == manifest


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda f: (f / "manifest.json").unlink(),
            "no manifest.json: it is half-written, or has pictures without embeddings",
        ),
        (lambda f: shutil.rmtree(f), "there is no '.*prepare"),
        (lambda f: (f / "records-00002.tfrecord").unlink(), "lacks 1 of its 7 files"),
        (
            lambda f: (f / "features.json").unlink(),
            "lacks 1 .*'features.json': copy it",
        ),
        (
            lambda f: (f / "manifest.json").write_text('{"format": 3'),
            "is not the manifest of records: ",
        ),
        (lambda f: _edit(f, format=2), "has format 2, .* reads format 3: prepare the"),
        (lambda f: (f / "manifest.json").write_text("{}"), "has format None, this"),
        (lambda f: _edit(f, colour="red"), "is damaged, prepare again: .*'colour'"),
        (lambda f: _edit(f, encoder=...), "is damaged, prepare again: .*'encoder'"),
    ],
)
def test_damaged_folders(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        read_manifest(copy)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"examples": "21"}, "examples"),
        ({"examples": -21}, "examples"),
        ({"examples": 20}, "examples"),
        ({"text_dim": 0}, "text_dim"),
        ({"text_dim": 64.0}, "text_dim"),
        ({"embedding_dtype": "float8"}, "embedding_dtype"),
        ({"cosine_error": {"mean": "0"}}, "cosine_error"),
        ({"settings": {"text_length": "8"}}, "settings"),
        ({"settings": []}, "settings"),
        ({"skipped_files": [{"file": 1}]}, "skipped_files"),
        ({"shards": ["x"]}, "shards"),
        ({"shards": []}, "examples"),
        ({"sides": {"32": 4}}, "shards"),
        ({"sides": {"-32": 5}}, "shards"),
        ({"sides": {"²": 5}}, "shards"),
        ({"sha256": None}, "shards"),
        ({"file": "/etc/passwd"}, "shards"),
    ],
)
def test_values_that_prepare_does_not_write(copy, changes, wrong):
    shards = json.loads((copy / "manifest.json").read_text())["shards"]
    if changes.keys() & shards[0].keys() - {"examples"}:
        changes = {"shards": [shards[0] | changes, *shards[1:]]}
    _edit(copy, **changes)
    with pytest.raises(UserError, match=f"again: {wrong} is not as `prepare` writes"):
        read_manifest(copy)


def test_entries_of_earlier_releases_are_passed_over(copy):
    """They counted the captions of a file by their tokens."""
    shards = json.loads((copy / "manifest.json").read_text())["shards"]
    assert "lengths" not in shards[0]
    _edit(copy, shards=[shard | {"lengths": {"8": 1}} for shard in shards])
    manifest = read_manifest(copy)
    assert manifest.examples == 21 and manifest.shards[0]["lengths"] == {"8": 1}


def test_files_outside_of_the_folder_are_not_read(copy):
    shards = json.loads((copy / "manifest.json").read_text())["shards"]
    shards[1]["file"] = "../other/records-00001.tfrecord"
    _edit(copy, shards=shards)
    with pytest.raises(UserError, match="prepare again: shards is not as `prepare` wr"):
        read_manifest(copy)


def test_no_records():
    with pytest.raises(UserError, match="there is no '': give config.data.records"):
        read_manifest("")


@pytest.mark.parametrize("kind", ["text", "truncated", "other", "pickle"])
def test_damaged_npz(npz, tmp_path, kind):
    path = tmp_path / "x.npz"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(pathlib.Path(npz).read_bytes()[:-200])
    elif kind == "other":
        np.savez(path, a=np.zeros(3))
    else:
        np.savez(path, manifest=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match="not a .npz file of `prepare`, or is damaged"):
        read_manifest(path)
