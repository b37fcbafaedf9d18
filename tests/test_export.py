"""A cascade as one folder: what is in it, and that it stays the same when passed on."""

import dataclasses
import importlib.util
import json
import re
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml
from absl import flags
from flax import traverse_util

from imagen_jax import images
from imagen_jax.api.cascade import CASCADE, open_stages
from imagen_jax.api.library import load_cascade
from imagen_jax.api.model_card import Told
from imagen_jax.api.samples import Job, make
from imagen_jax.errors import UserError
from imagen_jax.export import export_cascade, main
from imagen_jax.prepare import prepare
from imagen_jax.preparing.card import write_card
from imagen_jax.sharding import make_mesh
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.metrics import EVALUATIONS
from imagen_jax.training.state import create_state
from tests import tiny
from tests.training.checkpoints import truncate

TEXT = {"length": 4, "dim": 64, "encoder": "tiny@v2-seed0-2x64"}
BASE = tiny.stage(model=tiny.ONE_LEVEL, text=TEXT)
SR = dataclasses.replace(BASE, name="sr", image_size=16, lowres_size=8)
PROMPTS = ['a "red": <script>alert(1)</script>', "zwölf 狐"]
FIGURES = {"figures": {"FID": 7.27}, "samples": 2, "stages": [{"workdir": "/secret"}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two workdirs, with records and evaluations, and their cascade."""
    folder = tmp_path_factory.mktemp("made")
    records = str(folder / "records.npz")
    prepare("shapes:6", records, text_length=4, image_size=16)
    write_card(records)
    mesh = make_mesh(BASE.mesh, jax.devices()[:1])
    for name, cfg in (("base", BASE), ("sr", SR)):
        data = dataclasses.replace(cfg.data, records=records)
        cfg = dataclasses.replace(cfg, data=data)
        checkpointer = Checkpointer(str(folder / name), cfg.training)
        state = create_state(cfg, mesh)
        checkpointer.save(state.replace(step=jnp.int32(7)), cfg, b"")
        checkpointer.close()
        (folder / name / "config.json").write_text("{}")
    lines = [{"step": step, **FIGURES, "checkpoint": step} for step in (3, 7)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "base" / EVALUATIONS).write_text(text)
    workdirs = [str(folder / "base"), str(folder / "sr")]
    export_cascade(
        workdirs, str(folder / "one"), 8_000, "bfloat16", prompts=PROMPTS, samples=3
    )
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_cascade_holds_what_is_told_of_it(made):
    names = {name for name in contents(made / "one") if "safetensors" not in name}
    samples = {f"samples/{i:04d}.png" for i in range(3)}
    configs = {"16px/config.json", "8px/config.json"}
    files = {"README.md", "cascade.json", "samples.jsonl"}
    assert names == files | samples | configs
    assert json.loads((made / "one" / CASCADE).read_text())["stages"] == ["8px", "16px"]


def test_numbers_are_rounded_as_numpy_rounds_them(made):
    """By ml_dtypes, from what the trainer saved to what safetensors reads."""
    (stage,) = open_stages([str(made / "base")])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        n: jax.ShapeDtypeStruct(s, "f4", sharding=place)
        for n, s in stage.shapes.items()
    }
    saved = stage.load(traverse_util.unflatten_dict(like, sep="."))
    want = traverse_util.flatten_dict(saved, sep=".")
    found = {}
    for file in (made / "one/8px").glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        rounded = np.asarray(array).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found[name], rounded)


def test_exported_again_it_is_the_same(made, tmp_path):
    export_cascade([str(made / "one")], str(tmp_path / "two"), 8_000)
    again = open_stages([str(tmp_path / "two")])
    assert [stage.cfg.image_size for stage in again] == [8, 16]
    assert contents(tmp_path / "two") == contents(made / "one")


def test_samples_are_what_the_folder_makes(made, tmp_path):
    lines = (made / "one/samples.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["prompt"] for line in lines] == [*PROMPTS, PROMPTS[0]]
    assert [line["seed"] for line in lines] == [0, 1, 2]
    cascade = load_cascade(made / "one")
    job = Job(str(tmp_path / "out"), cascade.trained, [one["prompt"] for one in lines])
    make(job, cascade)
    for line, picture in zip(lines, job.read(), strict=True):
        kept = images.read(made / "one" / line["file"])
        np.testing.assert_array_equal(kept, picture)


def test_the_card_is_one_of_hugging_face(made):
    text = (made / "one/README.md").read_text("utf8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert [one["text"] for one in head.pop("widget")] == [*PROMPTS, PROMPTS[0]]
    assert head == {
        "library_name": "imagen-jax",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "license_name": "not-stated",
    }
    prose = re.sub("```.*?```", "", text.split("---\n")[2], flags=re.S)
    assert "<script>" not in prose and "&lt;script&gt;" in prose
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import ModelCard

        card = ModelCard.load(made / "one/README.md")
        assert card.data.library_name == "imagen-jax"
        assert card.data.license == "other" and len(card.data.widget) == 3


def test_the_card_tells_what_is_known(made, tmp_path):
    text = (made / "one/README.md").read_text("utf8")
    for words in (
        "| `16px` | 16 x 16 pixels from 8 x 8 | unet | ",
        "| 7 steps of 8 images |",
        "stored as bfloat16",
        "`tiny@v2-seed0-2x64`. It is part of imagen-jax",
        "| pictures | 6 |",
        "- FID 7.27; samples 2; checkpoint 7\n",
        "License: none is stated",
        "@inproceedings{saharia2022photorealistic",
    ):
        assert words in text, words
    assert "checkpoint 3" not in text and "What it was" not in text
    with pytest.raises(UserError, match="is no license"):
        Told("mit\ntags: [own]")
    told = Told("apache-2.0")
    export_cascade([str(made / "one")], str(tmp_path / "two"), 10**9, told=told)
    text = (tmp_path / "two/README.md").read_text("utf8")
    assert "\nlicense: apache-2.0\n" in text and "has to add" not in text


def test_no_text_names_a_place_of_its_publisher(made):
    for name, content in contents(made / "one").items():
        if not name.endswith(("png", "safetensors")):
            text = content.decode()
            assert str(made) not in text and "secret" not in text, name
            # No absolute path at all, but in addresses and in what ends a tag.
            assert not re.search(r"(?<![\w:/.<;])/\w", text), name


def test_all_or_nothing(made, tmp_path, monkeypatch):
    workdirs = [str(made / "base"), str(made / "sr")]

    def breaks(*_):
        raise OSError("no room")

    monkeypatch.setattr(images, "save", breaks)
    with pytest.raises(UserError, match="cannot be written: no room"):
        export_cascade(workdirs, str(tmp_path / "out"), 10**9, prompts=PROMPTS)
    with pytest.raises(UserError, match="give the stages in order"):
        export_cascade(workdirs[::-1], str(tmp_path / "out"), 10**9)
    assert not any(tmp_path.iterdir())


def test_flags_of_a_cascade_are_for_cascades(made, tmp_path, monkeypatch, capsys):
    given = {"stage": [str(made / "base")], "output": str(tmp_path / "out")}
    given |= {"shard_gb": 1.0, "dtype": "", "license": "mit", "evaluation": []}
    values = types.SimpleNamespace(**given, prompt=PROMPTS)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(UserError, match="give all --stage of a cascade"):
        main()
    values.prompt = []
    main()
    assert "Fill in the gaps" in capsys.readouterr().out
    assert "\nlicense: mit\n" in (tmp_path / "out/README.md").read_text()


def change(**values):
    def damage(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is not the cascade.json of an export"),
        (change(format_version=2), "has format version 2, this program reads 1"),
        (change(stages=["../base"]), "copy it again"),
        (change(stages=[]), "copy it again"),
        (change(stages="8px"), "copy it again"),
        (change(stages=["nope"]), "has no config.json"),
        (change(data=[1]), "copy it again"),
        (change(license=None), "copy it again"),
    ],
)
def test_a_damaged_cascade_is_refused(made, tmp_path, damage, message):
    (tmp_path / CASCADE).write_bytes((made / "one" / CASCADE).read_bytes())
    damage(tmp_path / CASCADE)
    with pytest.raises(UserError, match=re.escape(message)):
        open_stages([str(tmp_path)])


@pytest.mark.parametrize("file", ["../0000.png", "/etc/passwd", "0000.png", 3, None])
def test_samples_elsewhere_are_refused(made, tmp_path, file):
    for name, content in contents(made / "one").items():
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_bytes(content)
    line = {"file": file, "prompt": "x", "seed": 0}
    (tmp_path / "one/samples.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="line 1 is of no sample"):
        export_cascade([str(tmp_path / "one")], str(tmp_path / "two"), 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("encoder", ["t5_1_1_xxl@bfloat16-0123456789ab"])
def test_samples_need_the_weights_of_the_encoder(made, tmp_path, encoder, monkeypatch):
    """Before anything is written."""
    text = dataclasses.replace(BASE.text, encoder=encoder)
    stages = [
        dataclasses.replace(stage, cfg=dataclasses.replace(stage.cfg, text=text))
        for stage in open_stages([str(made / "base")])
    ]
    monkeypatch.setattr("imagen_jax.export.open_stages", lambda _: stages)
    with pytest.raises(UserError, match="give --encoder_weights"):
        export_cascade(["base"], str(tmp_path / "out"), 10**9, prompts=PROMPTS)
    export_cascade(["base"], str(tmp_path / "out"), 10**9)
    card = (tmp_path / "out/README.md").read_text()
    assert "https://huggingface.co/google/t5-v1_1-xxl" in card
