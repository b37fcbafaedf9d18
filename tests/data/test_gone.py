"""The records go while they are being read."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.data.source import open_records
from imagen_jax.errors import UserError


def test_a_folder_that_goes_is_said_and_a_position_survives_it(
    stage, records, mesh, tmp_path
):
    """What is in the queues still comes; then a file of the next epoch is missed."""
    folder = pathlib.Path(shutil.copytree(records, tmp_path / "records"))
    cfg = stage(str(folder))
    stream = open_records(cfg, mesh)
    next(stream)
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be read any more: .*No such file"):
        for _ in range(100):
            position = stream.get_state()
            next(stream)
    shutil.move(tmp_path / "elsewhere", folder)
    stream.set_state(position)
    other = open_records(cfg, mesh)
    other.set_state(position)
    jax.tree.map(np.testing.assert_array_equal, next(stream), next(other))


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_file_that_is_damaged_while_it_is_read(
    stage, records, mesh, tmp_path, damage
):
    folder = pathlib.Path(shutil.copytree(records, tmp_path / "records"))
    stream = open_records(stage(str(folder)), mesh)
    next(stream)
    for path in folder.glob("*.tfrecord"):
        content = bytearray(path.read_bytes())
        if damage == "cut":
            del content[len(content) // 2 :]
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match="not what it was .*record"):
        for _ in range(100):
            next(stream)
