"""What the sampling door reads from its flags."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.api.samples import make_folder
from imagen_jax.errors import UserError
from imagen_jax.sample import numbers, read_lowres


def test_lists_are_numbers_with_commas():
    assert numbers("guidance", ["1,1.35", "8"], float) == [(1.0, 1.35), (8.0,)]
    assert numbers("estimates", ["0,1"], int) == [(0, 1)]
    with pytest.raises(UserError, match="--guidance=1;2: give numbers with commas"):
        numbers("guidance", ["1;2"], float)


def test_pictures_to_start_from(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(path)
    assert read_lowres(paths, 4, 2)[:, 0, 0, 0].tolist() == [0, 1]
    assert read_lowres(paths[1:], 4, 3)[:, 0, 0, 0].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="--lowres is given 2 times for 3 prompts"):
        read_lowres(paths, 4, 3)
    with pytest.raises(UserError, match="4 x 4 pixels; the stage takes 8 x 8"):
        read_lowres(paths, 8, 2)


def test_folders_that_cannot_hold_pictures(tmp_path):
    with pytest.raises(UserError, match="--output=gs://b/x: sample to a disk"):
        make_folder("gs://b/x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x cannot be made: .*Not a directory"):
        make_folder(str(tmp_path / "file" / "x"))
    assert make_folder(str(tmp_path / "a" / "b")).is_dir()
