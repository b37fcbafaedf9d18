import errno

import pytest

from imagen_jax.errors import UserError
from imagen_jax.preparing import disk


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a"
    with disk.appearing(path) as partial:
        partial.write_text("half")
        assert not path.exists() and disk.is_temporary(partial)
        partial.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_nothing(tmp_path):
    disk.write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt):
        with disk.appearing(tmp_path / "a") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_two_processes_write_the_same_file(tmp_path):
    """One takes the other's for left over, once its own has appeared."""
    path = tmp_path / "a"
    with disk.appearing(path) as slow:
        slow.write_text("same")
        disk.write_text(path, "same")
        disk.remove_temporary(tmp_path)
        assert not slow.exists()
    assert path.read_text() == "same"
    with pytest.raises(FileNotFoundError):
        with disk.appearing(tmp_path / "b") as lost:
            lost.write_text("x")
            disk.remove_temporary(tmp_path)


def test_a_full_disk_is_said(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(UserError, match="is full: make room and start the same"):
            with disk.full(tmp_path):
                raise OSError(number, "no room")
    with pytest.raises(PermissionError):
        with disk.full(tmp_path):
            raise PermissionError(errno.EACCES, "no")
