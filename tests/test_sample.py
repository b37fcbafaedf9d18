"""What the sampling door reads from its flags."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.api.samples import check_output
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


def _png(width, height):
    """A picture's header, and nothing of the picture."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = header, b"IDAT" + zlib.compress(b""), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in chunks
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot be read: .*No such file"),
        (b"", "no picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "a known format"),
        (b"P6 4 4 255 " + bytes(48), "no picture of a known format"),
        # A size is refused before the picture is decoded, whatever the size.
        (_png(13_300, 13_300), "13300 x 13300 pixels; the stage takes 4 x 4"),
        (_png(30_000, 30_000), "30000 x 30000 pixels; the stage takes 4 x 4"),
        (_png(4, 4), r"cannot be read: \w+: "),
    ],
)
def test_files_that_are_no_picture_to_start_from(tmp_path, data, message):
    path = tmp_path / "a.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"--lowres={path} .*{message}"):
        read_lowres([str(path)], 4, 1)


def test_folders_that_cannot_hold_pictures(tmp_path):
    with pytest.raises(UserError, match="--output=gs://b/x: sample to a disk"):
        check_output("gs://b/x")
    (tmp_path / "file").touch()
    for name in ("file", "file/x"):
        with pytest.raises(UserError, match=f"{name}: .*/file is no folder to write"):
            check_output(str(tmp_path / name))
    check_output(str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()
