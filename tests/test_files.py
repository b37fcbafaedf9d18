"""Files that appear whole: what mode they have."""

import os

import pytest

from imagen_jax.files import appearing, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_file_that_appears_has_the_mode_of_the_umask(umask, tmp_path):
    write_text(tmp_path / "text", "a")
    with appearing(tmp_path / "moved") as partial:
        # As libraries do that make a temporary file of their own.
        own = tmp_path / "own"
        own.write_text("b")
        own.chmod(0o600)
        own.replace(partial)
    for name, content in (("text", "a"), ("moved", "b")):
        assert (tmp_path / name).read_text() == content
        assert mode(tmp_path / name) == 0o666 & ~umask
    assert {path.name for path in tmp_path.iterdir()} == {"text", "moved"}


def test_nothing_appears_where_nothing_was_written_to_the_end(tmp_path):
    with pytest.raises(ValueError), appearing(tmp_path / "a") as partial:
        partial.write_text("half")
        raise ValueError
    assert not [*tmp_path.iterdir()]
