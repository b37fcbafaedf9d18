"""A run as the doors start it: its config, preview and devices."""

import dataclasses

import numpy as np
import pytest

from imagen_jax.api import run
from imagen_jax.errors import UserError
from imagen_jax.prepare import prepare
from tests import tiny


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


def test_a_run_has_a_preview_and_tells_its_devices(values, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(run, "train", lambda *args: given.append(args))
    run.train_stage(run.resolve(values), "workdir")
    ((_, workdir, batches, mesh, preview, _),) = given
    assert workdir == "workdir" and mesh.size == 8
    told = capsys.readouterr().out
    assert told == (
        "training base on 8 x cpu (1 processes), "
        "mesh data 8 x fsdp 1 x spatial 1 x tensor 1\n"
    )
    # The first examples; the source is still before them.
    first = next(batches)
    np.testing.assert_array_equal(preview.id, np.asarray(first.id)[:3])
    np.testing.assert_array_equal(preview.image, np.asarray(first.image)[:3])


def test_a_gpu_that_jax_does_not_use_comes_before_the_devices(
    values, monkeypatch, capsys
):
    monkeypatch.setattr(run, "train", lambda *args: None)
    monkeypatch.setattr(run, "unused_gpu", lambda: "warning: there is a GPU")
    run.train_stage(run.resolve(values), "workdir")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "warning: there is a GPU" and second.startswith("training base on")
