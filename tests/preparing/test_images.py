import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.preparing import images
from imagen_jax.preparing.images import StoredImage, Unusable


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _file(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pixels(stored):
    image = Image.open(io.BytesIO(stored.data))
    assert image.format == "PNG" and image.mode == "RGB" and stored.reencoded
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7)])
def test_plain_files_stay_as_they_are(kind, shape):
    data = _file(_noise(*shape), kind)
    assert images.verify(data) == StoredImage(data, 7, False)


def test_transparency_lies_on_white():
    rgba = _noise(6, 5, 4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    pixels = _pixels(images.verify(_file(rgba)))
    alpha = rgba[..., 3:] / 255
    want = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels - want).max() <= 1
    assert (pixels[0] == 255).all() and (pixels[1] == rgba[1, :, :3]).all()


def test_palettes():
    image = Image.fromarray(_noise(8, 8, 3)).quantize(16)
    want = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(_pixels(images.verify(_file(image))), want)
    image.info["transparency"] = 3
    pixels = _pixels(images.verify(_file(image, transparency=3)))
    clear = np.asarray(image) == 3
    assert clear.any() and (pixels[clear] == 255).all()
    np.testing.assert_array_equal(pixels[~clear], want[~clear])


def test_exif_rotation_is_resolved():
    pixels = _noise(8, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    stored = images.verify(_file(pixels, exif=exif))
    np.testing.assert_array_equal(_pixels(stored), np.rot90(pixels, -1))
    assert stored.side == 8


def test_sixteen_bits():
    deep = np.linspace(0, 65_535, 48).astype(np.uint16).reshape(6, 8)
    pixels = _pixels(images.verify(_file(deep)))
    assert np.abs(pixels[..., 0] - deep / 257).max() <= 1


def test_sixteen_bit_colours():
    deep = _noise(5, 4, 6)  # high and low byte of each colour
    lines = b"".join(b"\0" + line.tobytes() for line in deep)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + _crc(name + data)
        for name, data in chunks
    )
    pixels = _pixels(images.verify(png))
    want = (deep[..., ::2].astype(int) * 256 + deep[..., 1::2]) / 257
    assert np.abs(pixels - want).max() <= 1


def _crc(data):
    return struct.pack(">I", zlib.crc32(data))


def test_of_an_animation_the_first_frame_is_taken():
    first, second = (Image.new("RGB", (6, 5), c) for c in ("red", "blue"))
    for kind in ("GIF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = _file(first, kind, save_all=True, append_images=[second], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        np.testing.assert_array_equal(
            _pixels(images.verify(data)), np.asarray(first), kind
        )


def test_other_formats():
    pixels = _noise(6, 6, 3)
    for kind, options in (("WEBP", {"lossless": True}), ("BMP", {})):
        stored = images.verify(_file(pixels, kind, **options))
        np.testing.assert_array_equal(_pixels(stored), pixels)
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = _pixels(images.verify(_file(cmyk, "JPEG")))
    assert (np.abs(red - [255, 0, 0]) < 6).all()


def test_broken_pictures():
    whole = _file(_noise(40, 40, 3))
    jpeg = _file(_noise(40, 40, 3), "JPEG")
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for data in (b"", b"no picture", whole[:-40], jpeg[: len(jpeg) // 2], flipped):
        with pytest.raises(Unusable, match=r"known format|\w+: .+") as error:
            images.verify(data)
        assert "0x" not in str(error.value)


def test_enormous_pictures():
    with io.BytesIO() as file:
        Image.new("1", (20_000, 9_000)).save(file, "PNG")
        data = file.getvalue()
    with pytest.raises(Unusable, match="180000000 pixels.* exceeds limit"):
        images.verify(data)


def _wave(height, width, period):
    x = np.arange(width) + 0.5
    line = 127.5 + 100 * np.sin(2 * np.pi * x / period)
    return np.repeat(np.broadcast_to(line, (height, width))[..., None], 3, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_large_pictures_are_reduced(kind):
    """Against the sampling theorem: waves stay if the new pixels can show them."""
    size = 32
    stored = {}
    for period in (3, 60):
        wave = _wave(160, 240, period).round().astype(np.uint8)
        result = images.verify(_file(wave, kind), stored_size=size)
        image = Image.open(io.BytesIO(result.data))
        assert image.format == ("PNG" if kind == "PNG" else "JPEG")
        assert image.size == (48, 32) and result.side == 32 and result.reencoded
        stored[period] = np.asarray(image, float)[:, 4:-4]
    want = _wave(size, 48, 60 / 5)[:, 4:-4]
    # Lanczos keeps waves of 12 pixels to a percent, of 100; two compressions add some.
    assert np.abs(stored[60] - want).mean() < (1 if kind == "PNG" else 2)
    assert np.abs(stored[3] - 127.5).mean() < 1


def test_what_is_not_too_large_stays():
    for size in (7, 8, 0):
        data = _file(_noise(9, 7, 3))
        stored = images.verify(data, stored_size=size)
        assert stored == StoredImage(data, 7, False)


def test_reduced_pictures_have_no_transparency_and_are_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.zeros((40, 80, 4), np.uint8)
    rgba[:, :40] = 255, 0, 0, 255
    stored = images.verify(_file(rgba, exif=exif), stored_size=10)
    pixels = _pixels(stored)
    # The filter rings for three pixels beside the edge.
    assert pixels.shape == (20, 10, 3)
    assert (pixels[:6] == [255, 0, 0]).all() and (pixels[-6:] == 255).all()


def test_a_jpeg_cut_at_its_end_is_found_when_it_is_decoded_smaller():
    whole = _file(_wave(400, 400, 50).astype(np.uint8), "JPEG")
    images.verify(whole, stored_size=16)
    with pytest.raises(Unusable, match="truncated"):
        images.verify(whole[: len(whole) * 9 // 10], stored_size=16)


@pytest.mark.parametrize(
    "shape, rules, message",
    [
        ((1, 1), {}, None),
        ((1, 1), {"min_side": 2}, "its shorter side has 1 of 2 pixels"),
        ((10, 20_000), {"stored_size": 64}, None),
        ((10, 20_000), {"min_side": 64}, "its shorter side has 10 of 64 pixels"),
        ((10, 20_000), {"max_aspect": 3}, "20000 by 10 pixels are more than 3 to 1"),
        ((300, 100), {"max_aspect": 3}, None),
        ((301, 100), {"max_aspect": 3}, "301 by 100 pixels"),
    ],
)
def test_rules(shape, rules, message):
    data = _file(np.zeros((*shape, 3), np.uint8))
    if message:
        with pytest.raises(Unusable, match=message):
            images.verify(data, **rules)
    else:
        assert images.verify(data, **rules) == StoredImage(data, min(shape), False)
