import io
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import folder
from imagen_jax.errors import UserError


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _file(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pixels(picture):
    image = Image.open(io.BytesIO(picture.data))
    assert image.format == "PNG" and image.mode == "RGB" and picture.reencoded
    return np.asarray(image)


def _write(root, metadata=None, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if metadata is not None:
        text = (
            metadata
            if isinstance(metadata, str)
            else "\n".join(
                json.dumps({"file_name": name, "text": text}) for name, text in metadata
            )
        )
        (root / "metadata.jsonl").write_text(text)
    return str(root)


class TestList:
    def test_metadata(self, tmp_path):
        path = _write(
            tmp_path,
            [
                ("./b.png", " two "),
                ("sub/a.JPG", "one"),
                ("gone.png", "x"),
                ("c.png", " "),
            ],
            b_png=b"",
            sub__a_JPG=b"",
            c_png=b"",
            extra_png=b"",
        )
        listing = folder.list_folder(path)
        assert listing.pairs == [("b.png", "two"), ("sub/a.JPG", "one")]
        assert listing.problems == [
            ("c.png", "the caption is empty"),
            ("extra.png", "not in metadata.jsonl"),
            ("gone.png", "has a caption, but there is no such picture"),
        ]

    def test_text_files(self, tmp_path):
        path = _write(
            tmp_path,
            a_png=b"",
            a_txt=b"one\n",
            sub__b_jpg=b"",
            sub__b_txt="zw\u00f6lf".encode(),
            c_png=b"",
            d_txt=b"four",
        )
        listing = folder.list_folder(path)
        assert listing.pairs == [("a.png", "one"), ("sub/b.jpg", "zw\u00f6lf")]
        assert listing.problems == [
            ("c.png", "has no .txt file beside it"),
            ("d.txt", "has a caption, but there is no such picture"),
        ]

    @pytest.mark.parametrize(
        "metadata, message",
        [
            (
                '{"file_name": "a.png", "text": "x"}\n\n{"file',
                "jsonl' line 3 is not valid JSON",
            ),
            ('{"file_name": "a.png"}', 'line 1 must be an object with "file_name"'),
            ('{"file_name": "a.png", "text": 3}', "line 1 must be .* both strings"),
            ("[1]", "line 1 must be an object"),
            (
                [("a.png", "x"), ("b.png", "y"), ("./a.png", "z")],
                "line 3 captions 'a.png' again, after line 1",
            ),
        ],
    )
    def test_wrong_metadata(self, tmp_path, metadata, message):
        path = _write(tmp_path, metadata, a_png=b"", b_png=b"")
        with pytest.raises(UserError, match=message):
            folder.list_folder(path)

    def test_wrong_folders(self, tmp_path):
        with pytest.raises(UserError, match="there is no folder '.*nowhere'"):
            folder.list_folder(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="has no pictures"):
            folder.list_folder(str(tmp_path))
        _write(tmp_path, a_png=b"")
        with pytest.raises(
            UserError, match="pictures but no captions: give it a metadata"
        ):
            folder.list_folder(str(tmp_path))
        _write(tmp_path, a_jpg=b"", a_txt=b"x")
        with pytest.raises(
            UserError, match="'a.jpg' and 'a.png' .* share the caption 'a.txt'"
        ):
            folder.list_folder(str(tmp_path))
        (tmp_path / "a.jpg").unlink()
        _write(tmp_path, a_txt=b"\xff\xfe")
        with pytest.raises(UserError, match="a.txt' is not UTF-8 text"):
            folder.list_folder(str(tmp_path))


class TestVerify:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    @pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7)])
    def test_plain_files_stay_as_they_are(self, kind, shape):
        data = _file(_noise(*shape), kind)
        assert folder.verify(data) == folder.Picture(data, 7, False)

    def test_transparency_lies_on_white(self):
        rgba = _noise(6, 5, 4)
        rgba[0, :, 3], rgba[1, :, 3] = 0, 255
        pixels = _pixels(folder.verify(_file(rgba)))
        alpha = rgba[..., 3:] / 255
        want = rgba[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels - want).max() <= 1
        assert (pixels[0] == 255).all() and (pixels[1] == rgba[1, :, :3]).all()

    def test_palettes(self):
        image = Image.fromarray(_noise(8, 8, 3)).quantize(16)
        want = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(_pixels(folder.verify(_file(image))), want)
        image.info["transparency"] = 3
        pixels = _pixels(folder.verify(_file(image, transparency=3)))
        clear = np.asarray(image) == 3
        assert clear.any() and (pixels[clear] == 255).all()
        np.testing.assert_array_equal(pixels[~clear], want[~clear])

    def test_exif_rotation_is_resolved(self):
        pixels = _noise(8, 16, 3)
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by a quarter, clockwise
        picture = folder.verify(_file(pixels, exif=exif))
        np.testing.assert_array_equal(_pixels(picture), np.rot90(pixels, -1))
        assert picture.side == 8

    def test_sixteen_bits(self):
        deep = np.linspace(0, 65_535, 48).astype(np.uint16).reshape(6, 8)
        pixels = _pixels(folder.verify(_file(deep)))
        assert np.abs(pixels[..., 0] - deep / 257).max() <= 1

    def test_other_formats(self):
        pixels = _noise(6, 6, 3)
        for kind, options in (("WEBP", {"lossless": True}), ("BMP", {})):
            picture = folder.verify(_file(pixels, kind, **options))
            np.testing.assert_array_equal(_pixels(picture), pixels)
        cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
        red = _pixels(folder.verify(_file(cmyk, "JPEG")))
        assert (np.abs(red - [255, 0, 0]) < 6).all()

    def test_broken_pictures(self):
        whole = _file(_noise(40, 40, 3))
        jpeg = _file(_noise(40, 40, 3), "JPEG")
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        for data in (b"", b"no picture", whole[:-40], jpeg[: len(jpeg) // 2], flipped):
            with pytest.raises(
                folder.BrokenPicture, match=r"known format|\w+: .+"
            ) as error:
                folder.verify(data)
            assert "0x" not in str(error.value)
