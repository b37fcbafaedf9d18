"""A run as the doors start it: its config, preview and devices."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from imagen_jax.api import run
from imagen_jax.config import from_dict
from imagen_jax.errors import UserError
from imagen_jax.prepare import prepare
from tests import npz, tiny
from tests.test_docs import ROOT, commands, parse


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """A config that names records and nothing of their text."""
    path = str(tmp_path_factory.mktemp("records") / "records.npz")
    prepare("shapes:16", path, text_length=4, image_size=8, progress=False)
    training = {"sample_every_steps": 2, "preview_images": 3}
    cfg = tiny.stage(
        data={"records": path}, training=training, text={"dim": 64, "encoder": ""}
    )
    return dataclasses.asdict(cfg)


def test_the_records_say_what_their_text_is(values):
    text = run.resolve(values).text
    assert (text.length, text.dim) == (4, 64) and text.encoder
    with pytest.raises(UserError, match="missing.npz"):
        run.resolve(values | {"data": {"records": "missing.npz"}})


@pytest.mark.parametrize("kind", ["file", "ConfigDict", "StageConfig"])
def test_a_run_from_python(values, monkeypatch, kind):
    """Its config in each form, with other values laid over it."""
    given, file = [], ROOT / "configs" / "tiny.py"
    monkeypatch.setattr(run.loop, "train", lambda *args: given.append(args))
    config = {
        "file": f"{file}:base",
        "ConfigDict": run.run_config(f"{file}:base"),
        "StageConfig": from_dict(run.run_config(f"{file}:base").to_dict()),
    }[kind]
    more = {"training.batch_size": 8, "image_size": 8, "text.length": 0}
    run.train(config, pathlib.Path(values["data"]["records"]), "workdir", more)
    ((cfg, workdir, *_),) = given
    assert (workdir, cfg.training.batch_size, cfg.image_size) == ("workdir", 8, 8)
    assert cfg.text.length == 4 and cfg.optimizer.learning_rate == 3e-3


def test_a_run_has_a_preview_and_tells_its_devices(values, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(run.loop, "train", lambda *args: given.append(args))
    run.train_stage(run.resolve(values), "workdir")
    ((cfg, workdir, batches, mesh, preview, _, heldout),) = given
    assert workdir == "workdir" and mesh.size == 8 and heldout is None
    told = capsys.readouterr().out
    assert told == (
        "training base on 8 x cpu (1 processes), "
        "mesh data 8 x fsdp 1 x spatial 1 x tensor 1\n"
    )
    # The first examples, however many have been taken.
    first = jax.device_get(next(batches))
    preview = preview()
    stored = npz.captions(values["data"]["records"])
    assert preview.captions == tuple(stored[i] for i in first.id[:3])
    for name in ("image", "text", "mask"):
        np.testing.assert_array_equal(getattr(preview, name), getattr(first, name)[:3])


def test_a_preview_has_the_prompts_that_were_asked_for(values, monkeypatch):
    """Embedded as `prepare` embeds captions."""
    monkeypatch.setattr(run.loop, "train", lambda *args: given.append(args))
    prompts, given = npz.captions(values["data"]["records"])[:2], []
    cfg = run.resolve(values)
    training = dataclasses.replace(cfg.training, preview_prompts=tuple(prompts))
    run.train_stage(dataclasses.replace(cfg, training=training), "workdir")
    ((_, _, batches, _, preview, _, _),) = given
    preview = preview()
    assert preview.captions[3:] == tuple(prompts) and len(preview.image) == 3
    every = [jax.device_get(next(batches)) for _ in range(2)]
    text = {int(i): t for batch in every for i, t in zip(batch.id, batch.text)}
    mask = {int(i): m for batch in every for i, m in zip(batch.id, batch.mask)}
    for i in range(2):
        np.testing.assert_array_equal(preview.text[3 + i], text[i])
        np.testing.assert_array_equal(preview.mask[3 + i], mask[i])
    other = dataclasses.replace(cfg.text, encoder="t5_1_1_small@bfloat16-0123456789ab")
    broken = dataclasses.replace(cfg, training=training, text=other)
    with pytest.raises(UserError, match="weights"):
        run.open_preview(broken, batches)


@pytest.mark.slow
def test_the_next_command_is_one():
    found = []
    for lowres in (0, 4):
        for encoder in ("tiny@v2", "t5_1_1_xxl@bfloat16-0123456789ab"):
            cfg = tiny.stage(lowres_size=lowres, text={"encoder": encoder})
            told = run.next_command(cfg, "runs/my base")
            ((door, words),) = commands(f"```\n{told}\n```\n")
            assert door == "sample"
            stages = ["--stage=runs/my base"]
            assert [w for w in words if "--stage" in w] == (
                [f"--stage=WORKDIR_OF_{lowres}_PIXELS", *stages] if lowres else stages
            )
            assert ("--encoder_weights=FOLDER" in words) == encoder.startswith("t5")
            found.append((door, words))
    assert not any(parse(found))


@pytest.mark.parametrize(("end", "told"), [(2, True), (4, False), (0, False)])
def test_a_rate_of_0_on_purpose_is_told(values, monkeypatch, capsys, end, told):
    monkeypatch.setattr(run.loop, "train", lambda *args: None)
    optimizer = values["optimizer"] | {"decay_steps": end, "warmup_steps": 1}
    run.train_stage(run.resolve(values | {"optimizer": optimizer}), "workdir")
    said = (
        "the learning rate is 0 from step 2 on, the last is 4"
        in capsys.readouterr().out
    )
    assert said == told


def test_a_gpu_that_jax_does_not_use_comes_before_the_devices(
    values, monkeypatch, capsys
):
    monkeypatch.setattr(run.loop, "train", lambda *args: None)
    monkeypatch.setattr(run, "unused_gpu", lambda: "warning: there is a GPU")
    run.train_stage(run.resolve(values), "workdir")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "warning: there is a GPU" and second.startswith("training base on")
