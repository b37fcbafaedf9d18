"""Exported folders: what is in them, and what is said of one that is damaged."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from imagen_jax.api.cascade import open_stages
from imagen_jax.errors import UserError
from imagen_jax.export import export
from imagen_jax.training import weights
from imagen_jax.training.checkpoint import Checkpointer
from tests.training.checkpoints import CFG, state, truncate

SECRETIVE = dataclasses.replace(
    CFG,
    data=dataclasses.replace(CFG.data, records="gs://secret/records"),
    training=dataclasses.replace(CFG.training, init_from="gs://secret/weights"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workdir, and what `export` made of it: several files and one."""
    folder = tmp_path_factory.mktemp("made")
    checkpointer = Checkpointer(str(folder / "run"), CFG.training)
    checkpointer.save(state(7), SECRETIVE, b"")
    checkpointer.close()
    (folder / "run/config.json").write_text("{}")
    export(str(folder / "run"), str(folder / "many"), 8_000)
    export(str(folder / "run"), str(folder / "one"), 10**9)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A folder of several files that a test may damage."""
    return shutil.copytree(made / "many", tmp_path / "export")


def test_other_programs_read_it(made):
    """safetensors' own reader finds every number; the index is Hugging Face's."""
    want = traverse_util.flatten_dict(state(7).ema, sep=".")
    index = json.loads((made / "many" / weights.INDEX).read_text())
    found = {}
    for file in sorted((made / "many").glob("*.safetensors")):
        held = safetensors.numpy.load_file(file)
        assert sum(a.nbytes for a in held.values()) <= 8_000 or len(held) == 1
        assert {name for name, f in index["weight_map"].items() if f == file.name} == {
            *held
        }
        found |= held
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in want.values())
    one = safetensors.numpy.load_file(made / "one/model.safetensors")
    assert one.keys() == want.keys()
    assert {p.name for p in made.iterdir()} == {"run", "many", "one"}


def test_the_card_and_the_config_say_what_it_is(made):
    card = (made / "one/README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(state(7).ema))
    for words in (
        f"{count:,} parameters",
        "7 steps of 8 images",
        "`fake@1`, 4 tokens of width 8",
        "8 x 8 pixels from a caption",
        "--stage=one",
        "License: none is stated",
    ):
        assert words in card, words
    assert "secret" not in (made / "one/config.json").read_text() + card
    (stage,) = open_stages([str(made / "one")])
    assert stage.step == 7 and stage.cfg.model == CFG.model
    # Known by the same digits wherever it was exported to.
    digests = {w.digest for w in open_stages([str(made / n) for n in ("run", "many")])}
    assert digests == {stage.digest} and re.fullmatch("[0-9a-f]{12}", stage.digest)
    assert stage.cfg.text.encoder == "fake@1" and stage.cfg.data.records == ""


def test_no_text_of_an_export_names_a_place_of_its_publisher(made, monkeypatch):
    """Whatever it was exported from and to, and given as."""
    monkeypatch.chdir(made)
    export("run", "./relative", 10**9)
    own = (
        str(made),
        str(pathlib.Path.home()),
        "secret",
        str(made / "run"),
        "relative/",
    )
    for folder in ("many", "one", "relative"):
        texts = [p for p in (made / folder).iterdir() if p.suffix != ".safetensors"]
        assert len(texts) >= 2
        for path in texts:
            text = path.read_text()
            assert not [place for place in own if place in text], path
            # No absolute path at all, but in addresses.
            assert not re.search(r"(?<![\w:/.])/\w", text), path
        assert f"--stage={folder} " in (made / folder / "README.md").read_text()
    shutil.rmtree(made / "relative")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_exported_files_have_the_mode_of_the_umask(made, tmp_path, umask):
    before = os.umask(umask)
    try:
        export(str(made / "run"), str(tmp_path / "out"), 8_000)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert len(modes) > 4 and set(modes.values()) == {0o666 & ~umask}


def test_nothing_is_overwritten(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(str(made / "run"), str(tmp_path), 10**9)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot be written"):
        export(str(made / "run"), str(tmp_path / "thesis.tex" / "out"), 10**9)


def change(name, **values):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def cast(dtype):
    """One parameter stored as another type."""

    def damage(folder):
        shard = sorted(folder.glob("*.safetensors"))[0]
        arrays = safetensors.numpy.load_file(shard)
        name = sorted(arrays)[0]
        arrays[name] = arrays[name].astype(dtype)
        safetensors.numpy.save_file(arrays, shard)

    return damage


DAMAGED = {
    "no config": (lambda f: (f / weights.CONFIG).unlink(), "has no config.json"),
    "truncated config": (lambda f: truncate(f / weights.CONFIG), "is not the config"),
    "version": (
        change(weights.CONFIG, schema_version=99),
        "has schema version 99, this program reads 2",
    ),
    "truncated index": (lambda f: truncate(f / weights.INDEX), "is not the index"),
    "no shard": (lambda f: sorted(f.glob("*.safe*"))[1].unlink(), "copy it again"),
    "truncated": (lambda f: truncate(sorted(f.glob("*.safe*"))[0]), "copy it again"),
    "another network": (
        lambda f: shutil.copy(sorted(f.glob("*.safe*"))[0], f / weights.SINGLE),
        "do not fit this stage",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused(folder, case):
    damage, message = DAMAGED[case]
    damage(folder)
    with pytest.raises(UserError) as found:
        open_stages([str(folder)])
    assert message in str(found.value), str(found.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_of_other_programs_are_cast(folder, dtype):
    cast(dtype)(folder)
    (stage,) = open_stages([str(folder)])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((8,), np.float32, sharding=place)
    like = {"conv_in": {"bias": leaf}}
    bias = stage.load(like)["conv_in"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_allclose(bias, state(7).ema["conv_in"]["bias"], rtol=1e-3)
