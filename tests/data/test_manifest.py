import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from imagen_jax.data import manifest as manifests
from imagen_jax.data.manifest import read_manifest, with_text
from imagen_jax.data.source import open_records
from imagen_jax.errors import UserError


@pytest.fixture
def copy(records, tmp_path):
    return pathlib.Path(shutil.copytree(records, tmp_path / "copy"))


def _edit(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_says_what_was_prepared(records, npz):
    manifest = read_manifest(records)
    assert (manifest.examples, manifest.skipped) == (21, 0)
    assert (manifest.encoder, manifest.text_dim) == ("tiny@v2-seed0-2x64", 64)
    # "picture 3, so so so" and the end; "picture 0," and the end.
    assert (manifest.tokens_max, manifest.cut_captions) == (8, 0)
    assert manifest.tokens_mean == round((21 * 4 + 40) / 21, 2)
    assert [manifest.longer_than(n) for n in (3, 4, 7, 8)] == [21, 16, 4, 0]
    assert [shard["examples"] for shard in manifest.shards] == [5, 5, 5, 5, 1]
    assert sum(manifest.large_enough(32)) == 15 and sum(manifest.large_enough(31)) == 18
    small = read_manifest(npz)
    assert (small.examples, small.skipped) == (15, 6)
    assert small.skipped_files[0]["reason"].endswith("of 32 pixels")


def test_content_hash_is_of_the_content(records, copy):
    assert read_manifest(copy).content_sha256 == read_manifest(records).content_sha256
    _edit(copy, encoder="tiny@v2")
    assert read_manifest(copy).content_sha256 != read_manifest(records).content_sha256


def test_with_text(records, stage):
    cfg = stage(records)
    assert cfg.text.encoder == "tiny@v2-seed0-2x64" and cfg.text.dim == 64
    blank = dataclasses.replace(cfg.text, encoder="", dim=9)
    cfg = dataclasses.replace(cfg, text=blank)
    assert with_text(cfg, read_manifest(records)).text.dim == 64
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(blank, encoder="other@1"))
    with pytest.raises(UserError, match="encoder 'tiny.*is 'other@1'"):
        with_text(cfg, read_manifest(records))


def test_round_trip(records):
    manifest = read_manifest(records)
    assert manifests.from_json(manifests.to_json(manifest), "x") == manifest


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "manifest.json").unlink(), "half-written.*run it again"),
        (
            lambda f: [(f / n).unlink() for n in ("manifest.json", "prepare.json")],
            "has no manifest.json",
        ),
        (
            lambda f: (f / "manifest.json").rename(f / "pictures.json"),
            "has pictures without embeddings; add them: .*--source=webdataset",
        ),
        (lambda f: shutil.rmtree(f), "there is no '.*prepare"),
        (lambda f: (f / "records-00002.tfrecord").unlink(), "lacks 1 of its 5 files"),
        (lambda f: _truncate(f / "manifest.json"), "is not valid JSON"),
        (lambda f: _edit(f, format=1), "is of format 1, .* reads format 3: prepare ag"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is no manifest, this"),
        (lambda f: _edit(f, colour="red"), r"damaged: \['colour'\]"),
    ],
)
def test_damaged_folders(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        read_manifest(copy)


def _with_shard(folder, **values):
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1] |= values
    _edit(folder, shards=shards)


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [
        (lambda f: _edit(f, shards=3), "shards"),
        (lambda f: _edit(f, shards=[3]), r"shards\[0\]"),
        (lambda f: _edit(f, encoder=None), "encoder"),
        (lambda f: _edit(f, tokens_mean="many"), "tokens_mean"),
        (lambda f: _edit(f, examples=10**30), "examples"),
        (lambda f: _edit(f, examples=True), "examples"),
        (lambda f: _edit(f, examples=22), "examples"),
        (lambda f: _edit(f, text_dim=-64), "text_dim"),
        (lambda f: _edit(f, embedding_dtype="float8"), "embedding_dtype"),
        (lambda f: _with_shard(f, file=["x"]), r"shards\[1\]"),
        (lambda f: _with_shard(f, examples=-5), r"shards\[1\]"),
        (lambda f: _with_shard(f, sides={"64": 4}), r"shards\[1\]"),
        (lambda f: _with_shard(f, sides={"large": 5}), r"shards\[1\]"),
        (lambda f: _with_shard(f, lengths={"4": -1}), r"shards\[1\]"),
    ],
)
def test_hostile_manifests(copy, edit, wrong):
    edit(copy)
    with pytest.raises(UserError, match=f"damaged: {wrong} is not what `prepare` wr"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["../other/records-00001.tfrecord", "/etc/passwd"])
def test_files_outside_of_the_folder_are_not_read(copy, name):
    _with_shard(copy, file=name)
    with pytest.raises(UserError, match=f"lacks 1 of its 5 files, first '{name}'"):
        read_manifest(copy)


def test_no_records(stage, records, mesh):
    cfg = stage(records)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, records=""))
    with pytest.raises(UserError, match="config.data.records is empty"):
        open_records(cfg, mesh)


@pytest.mark.parametrize("kind", ["text", "truncated", "other", "pickle", "pipe"])
def test_damaged_npz(npz, tmp_path, kind):
    path = tmp_path / "x.npz"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(pathlib.Path(npz).read_bytes()[:-200])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other":
        np.savez(path, a=np.zeros(3))
    else:
        np.savez(path, manifest=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match="is no .npz file of `prepare`, or is damaged"):
        read_manifest(path)
