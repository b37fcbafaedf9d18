"""Exported folders: what is in them, and what a hostile one cannot do."""

import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from imagen_jax.api.cascade import open_stages
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.export import export
from imagen_jax.sharding import make_mesh
from imagen_jax.training import weights as exported
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import create_state
from imagen_jax.training.weights import Exported
from tests import tiny

CFG = tiny.stage(
    model=tiny.ONE_LEVEL,
    data={"records": "gs://secret/records"},
    training={"init_from": "gs://secret/weights"},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workdir, and what `export` made of it: several files and one."""
    folder = tmp_path_factory.mktemp("made")
    state = create_state(CFG, make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpointer = Checkpointer(str(folder / "run"), CFG.training)
    checkpointer.save(state.replace(step=jax.numpy.int32(7)), CFG, b"")
    checkpointer.close()
    (folder / "run/config.json").write_text("{}")
    export(str(folder / "run"), str(folder / "many"), 8_000)
    export(str(folder / "run"), str(folder / "one"), 10**9)
    return folder, jax.device_get(state.ema)


@pytest.fixture
def folder(made, tmp_path):
    """A folder of several files that a test may spoil."""
    copy = tmp_path / "export"
    copy.mkdir()
    for path in (made[0] / "many").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_other_programs_read_it(made):
    """safetensors' own reader finds every number; the index is Hugging Face's."""
    folder, ema = made
    want = traverse_util.flatten_dict(ema, sep=".")
    index = json.loads((folder / "many" / exported.INDEX).read_text())
    found = {}
    for file in sorted((folder / "many").glob("*.safetensors")):
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
    one = safetensors.numpy.load_file(folder / "one/model.safetensors")
    assert one.keys() == want.keys()
    assert {p.name for p in folder.iterdir()} == {"run", "many", "one"}


def test_the_card_and_the_config_say_what_it_is(made):
    folder, ema = made
    card = (folder / "one/README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(ema))
    for words in (
        f"{count:,} parameters",
        "7 steps of 8 pictures",
        "`fake@1`, 4 tokens of width 8",
        "8 x 8 pixels from a caption",
        f"--stage={folder}/one",
        "License: none is stated",
    ):
        assert words in card, words
    assert "secret" not in (folder / "one/config.json").read_text() + card
    (stage,) = open_stages([str(folder / "one")])
    assert stage.step == 7 and stage.cfg.model == CFG.model
    assert stage.cfg.text.encoder == "fake@1" and stage.cfg.data.records == ""


def test_nothing_is_overwritten(made, tmp_path):
    folder, _ = made
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(str(folder / "run"), str(tmp_path), 10**9)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot be written"):
        export(str(folder / "run"), str(tmp_path / "thesis.tex" / "out"), 10**9)


def names_a_file(name):
    def spoil(folder):
        index = folder / exported.INDEX
        first = next(iter(json.loads(index.read_text())["weight_map"]))
        change(index, weight_map={first: str(name(folder))})

    return spoil


def link(name, target="/etc/passwd"):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def pipe(name):
    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def stage(**groups):
    def spoil(folder):
        path = folder / exported.CONFIG
        config = json.loads(path.read_text())
        for group, values in groups.items():
            config["stage"][group] = (
                {**config["stage"][group], **values} if type(values) is dict else values
            )
        path.write_text(json.dumps(config))

    return spoil


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def large(name):
    return lambda folder: os.truncate(folder / name, 2**40)


SHARD = "model-00001-of-00004.safetensors"
DEEP = "[" * 100_000
HOSTILE = {
    "parent": (names_a_file(lambda f: "../secret.safetensors"), "only .safetensors"),
    "absolute": (names_a_file(lambda f: f.parent / "secret.safetensors"), "only .saf"),
    "pickle": (names_a_file(lambda f: "model.bin"), "only .safetensors"),
    "no name": (names_a_file(lambda f: 7), "only .safetensors files"),
    "empty map": (text(exported.INDEX, '{"weight_map": {}}'), "names no files"),
    "list": (text(exported.INDEX, "[]"), "names no files"),
    "linked weights": (link("*"), "no regular file"),
    "linked index": (link(exported.INDEX), "no regular file"),
    "linked config": (link(exported.CONFIG), "no regular file"),
    "linked in a circle": (link(exported.CONFIG, exported.CONFIG), "no regular file"),
    "endless config": (link(exported.CONFIG, "/dev/zero"), "no regular file"),
    "pipe": (pipe(exported.CONFIG), "no regular file"),
    "pipe of weights": (pipe("*"), "no regular file"),
    "large config": (large(exported.CONFIG), "more than is plausible"),
    "large index": (large(exported.INDEX), "more than is plausible"),
    "deep config": (text(exported.CONFIG, DEEP), "not valid JSON"),
    "deep index": (text(exported.INDEX, DEEP), "not valid JSON"),
    "long number": (text(exported.CONFIG, "9" * 10_000), "not valid JSON"),
    "not text": (lambda f: (f / exported.CONFIG).write_bytes(b"\xff"), "not valid"),
    "no version": (text(exported.CONFIG, "{}"), "has no schema version"),
    "list for config": (text(exported.CONFIG, "[]"), "not what `export` writes"),
    "another version": (
        lambda f: change(f / exported.CONFIG, schema_version=99),
        "schema version 99, this program reads 2",
    ),
    "no step": (lambda f: change(f / exported.CONFIG, step="7"), "or no step"),
    "unknown field": (stage(__class__="os.system"), "__class__ does not exist"),
    "unknown group": (stage(model={"import": "os"}), "model.import does not exist"),
    "blocks": (stage(model={"num_res_blocks": [10**12]}), "1000000000000 blocks"),
    "levels": (stage(model={"channels": [8] * 10**5}), "100000 levels, 1 blocks"),
    "pixels": (stage(image_size=2**40), "it is 16384 at most"),
    "text": (stage(text={"length": 10**12}), "it is 65536 at most"),
    "steps": (stage(sampler={"steps": 10**12}), "it is 65536 at most"),
    "nan": (stage(model={"num_res_blocks": [float("nan")]}), "must be of type int"),
    "another network": (stage(model={"channels": [16]}), "do not fit this stage"),
    "damaged": (text("*", "{}"), "no safetensors file, or is damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused(folder, case, monkeypatch):
    spoil, message = HOSTILE[case]
    shard = sorted(folder.glob("*.safetensors"))[0]
    (folder.parent / "secret.safetensors").write_bytes(shard.read_bytes())
    # "*" stands for a file of weights.
    inside = pathlib.Path.__truediv__
    monkeypatch.setattr(
        pathlib.Path,
        "__truediv__",
        lambda a, b: inside(a, shard.name if b == "*" else b),
    )
    spoil(folder)
    monkeypatch.undo()
    before = {*folder.parent.rglob("*")}, {*sys.modules}
    with pytest.raises(UserError) as found:
        open_stages([str(folder)])
    assert message in str(found.value), str(found.value)
    assert {*folder.parent.rglob("*")} == before[0]
    assert {name for name in sys.modules if name not in before[1]} == set()


def test_numbers_are_read_and_not_trusted(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    good = safetensors.numpy.load_file(shard)
    name = sorted(good)[0]
    like = {name: jax.ShapeDtypeStruct(good[name].shape, np.float32)}
    for wrong, message in (
        ({**good, name: np.full_like(good[name], np.nan)}, "inf or NaN"),
        ({**good, name: good[name].astype(np.int8)}, "stored as I8"),
    ):
        safetensors.numpy.save_file(wrong, shard)
        with pytest.raises(UserError, match=message):
            Exported(str(folder)).load(like)
    assert not list(folder.rglob("*.py"))
