import concurrent.futures
import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from imagen_jax.data import start_tensorflow
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
    png = _png(
        (b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    pixels = _pixels(images.verify(png))
    want = (deep[..., ::2].astype(int) * 256 + deep[..., 1::2]) / 257
    assert np.abs(pixels - want).max() <= 1


def _png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + _crc(name + data)
        for name, data in chunks
    )


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


def _header(kind, width, height):
    """A file that says it is so large, and holds next to nothing."""
    if kind == "PNG":
        first = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return _png((b"IHDR", first), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    data = bytearray(_file(Image.new("RGB", (8, 8)), kind))
    if kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
    else:
        flags = struct.pack("<I", 2)  # animated: frames may be smaller than the canvas
        sides = b"".join(struct.pack("<I", n - 1)[:3] for n in (width, height))
        frame = bytes(6) + b"\x07\0\0" * 2 + bytes(4) + data[12:]
        chunks = ((b"VP8X", flags + sides), (b"ANIM", bytes(6)), (b"ANMF", frame))
        body = b"".join(n + struct.pack("<I", len(d)) + d for n, d in chunks)
        data = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return bytes(data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_enormous_pictures_are_refused_by_their_header(kind):
    """Nothing of them is decoded, and Pillow does not warn of them."""
    for width, height in ((13_300, 13_300), (16_383, 16_000), (12_000, 11_000)):
        with pytest.raises(Unusable, match=f"{width} by {height} .*max_pixels=12800"):
            images.verify(_header(kind, width, height), stored_size=64)
    # What is allowed may be as empty as it likes.
    with contextlib.suppress(Unusable):
        images.verify(_header(kind, 3_000, 3_000), max_pixels=9_000_000)
    with pytest.raises(Unusable, match="3000 by 3000 .*max_pixels=8999999"):
        images.verify(_header(kind, 3_000, 3_000), max_pixels=8_999_999)
    # Pillow's own limit is for everybody else.
    assert Image.MAX_IMAGE_PIXELS is not None


def test_the_most_pixels():
    data = _file(_noise(10, 11, 3))
    assert images.verify(data, max_pixels=110).data == data
    with pytest.raises(Unusable, match="11 by 10 pixels are more than --max_pixels=10"):
        images.verify(data, max_pixels=109)
    assert images.MAX_PIXELS > 11_648 * 8_736  # the largest of common cameras


@pytest.mark.parametrize(
    "megapixels, at_once, most",
    [(0.01, True, 8), (4, False, 1)],
)
def test_large_pictures_wait_for_each_other(monkeypatch, megapixels, at_once, most):
    """Of 64 MiB: an RGBA picture of 4 megapixels is alone with them, small ones not."""
    monkeypatch.setattr(images, "_UNITS", 4)
    monkeypatch.setattr(images, "_FREE", threading.Semaphore(4))
    side = int((megapixels * 1e6) ** 0.5)
    data = _file(Image.new("RGBA", (side, side)))
    inside, seen, lock = [], [], threading.Lock()
    together = threading.Barrier(2, timeout=20)
    store = images._store

    def slowly(image, *rest):
        with lock:
            inside.append(None)
            seen.append(len(inside))
        if at_once:
            together.wait()
        try:
            return store(image, *rest)
        finally:
            with lock:
                inside.pop()

    monkeypatch.setattr(images, "_store", slowly)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(images.verify, [data] * 8))
    assert len({stored.data for stored in done}) == 1
    assert max(seen) <= most and (max(seen) > 1) == at_once


def test_what_a_picture_took_is_free_again():
    for _ in range(3):
        with pytest.raises(Unusable):
            images.verify(_file(Image.new("RGB", (3000, 3000)))[:-900])
    images.verify(_file(_noise(9, 9, 3)))
    assert images._FREE._value == images._UNITS


MEMORY = """
import concurrent.futures, io
from PIL import Image
from imagen_jax import cli
from imagen_jax.preparing import images

file = io.BytesIO()
Image.new("P", (4500, 4500)).save(file, "PNG", transparency=0)
before = cli.peak_memory_gib()
images.give_memory_back()
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: images.verify(file.getvalue(), stored_size=64), range(16)))
print(cli.peak_memory_gib() - before)
"""


@pytest.mark.slow
def test_the_memory_of_large_pictures():
    """Eight threads would take 2 GiB for 20 megapixels of 13 bytes each, or keep it."""
    taken = float(subprocess.check_output([sys.executable, "-c", MEMORY]))
    assert 13 * 4500**2 / 2**30 < taken < 1


# Files of other formats that Pillow reads, under any name: EPS by starting a program.
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
)


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "PPM", "ICO", "TGA", "PCX", "PDF"])
def test_formats_that_are_not_documented_are_not_opened(kind, tmp_path, monkeypatch):
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho started >> {started}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    data = EPS if kind == "EPS" else _file(Image.new("RGB", (32, 32)), kind)
    with pytest.raises(Unusable, match="it is no picture of a known format"):
        images.verify(data)
    assert not started.exists()


@pytest.fixture(scope="module")
def training():
    """The decoder of the trainer, and `sides`."""
    start_tensorflow()
    from imagen_jax.data import preprocess

    return preprocess


def _wave(height, width, period):
    x = np.arange(width) + 0.5
    line = 127.5 + 100 * np.sin(2 * np.pi * x / period)
    return np.repeat(np.broadcast_to(line, (height, width))[..., None], 3, 2)


def _damaged(data, random):
    """A byte, a part or the end of a file is another one, or gone."""
    place = int(random.integers(len(data)))
    end = place + int(random.integers(1, 40))
    return [
        data[:place] + random.bytes(1) + data[place + 1 :],
        data[:place] + data[end:],
        data[:place] + random.bytes(16) + data[place:],
        data[:place],
    ][random.integers(4)]


@pytest.mark.parametrize("shape", [(30, 40, 3), (40, 30)])
@pytest.mark.parametrize(
    "kind, options",
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True})],
)
def test_training_decodes_what_is_kept(training, kind, options, shape):
    """Of damaged files as well: never anything that `decode` refuses."""
    random = np.random.default_rng(0)
    wave = _wave(*shape[:2], 9).astype(np.uint8)
    data = _file(wave if len(shape) == 3 else wave[..., 0].copy(), kind, **options)
    whole = images.verify(data, sides=training.sides)
    assert whole == StoredImage(data, 30, False)
    kept = 0
    for _ in range(150):
        with contextlib.suppress(Unusable):
            stored = images.verify(_damaged(data, random), sides=training.sides)
            pixels = training.decode(stored.data).numpy()
            assert min(pixels.shape[:2]) == stored.side
            kept += 1
    assert 10 < kept < 150


def test_what_only_pillow_decodes_is_encoded_again(training):
    """A PNG without its last chunk, with the pixels of the original."""
    pixels = _noise(20, 30, 3)
    damaged = _file(pixels)[:-12]
    assert training.sides(damaged) is None
    stored = images.verify(damaged, sides=training.sides)
    np.testing.assert_array_equal(_pixels(stored), pixels)
    np.testing.assert_array_equal(training.decode(stored.data).numpy(), pixels)
    # Without the decoder of the trainer it stays as it is.
    assert images.verify(damaged) == StoredImage(damaged, 20, False)


@pytest.mark.parametrize("sides", [None, (30, 20), (19, 30)])
def test_what_training_sees_decides(sides):
    """Here it sees another size, or nothing, whatever it is given."""
    with pytest.raises(Unusable, match="training cannot decode it"):
        images.verify(_file(_noise(20, 31, 3)), sides=lambda data: sides)


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
