"""A checkpoint of an earlier day: read as it was, and sampled as it was."""

import pathlib
import zipfile

import jax
import numpy as np
import pytest

from imagen_jax.api.cascade import load, open_stages
from imagen_jax.config import MeshConfig
from imagen_jax.sharding import make_mesh
from tests.references import make_checkpoint

FOLDER = pathlib.Path(make_checkpoint.__file__).parent


@pytest.mark.slow
def test_a_checkpoint_of_schema_version_2(tmp_path, capsys):
    with zipfile.ZipFile(FOLDER / "checkpoint.zip") as file:
        file.extractall(tmp_path)
    want = np.load(FOLDER / "checkpoint.npz", allow_pickle=False)
    (stage,) = open_stages([str(tmp_path)])
    assert not capsys.readouterr().err
    assert stage.step == 4
    assert stage.cfg.model == make_checkpoint.CFG.model
    assert stage.cfg.text.encoder == "fake@1"
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = make_checkpoint.fingerprints(load(stage, mesh).params)
    np.testing.assert_array_equal(found["names"], want["names"])
    np.testing.assert_array_equal(found["sums"], want["sums"])
    made = make_checkpoint.sample(str(tmp_path))
    # Another compiler sums in another order: what lies between two of 256 levels may
    # fall to either.
    difference = np.abs(made.astype(int) - want["pictures"])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert len({picture.tobytes() for picture in made}) == len(made)
