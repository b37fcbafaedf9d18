import io
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.batch import downsample, pad_text
from imagen_jax.data import start_tensorflow
from imagen_jax.text import embeddings

start_tensorflow()
from imagen_jax.data import preprocess  # noqa: E402


def _noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def _file(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _area_weights(size, side):
    """`[size, side]`: the share of each source pixel in each target pixel."""
    edges = np.arange(size + 1) * side / size
    pixel = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(
        edges[:-1, None], pixel
    )
    return overlap.clip(0) * size / side


@pytest.mark.slow
@pytest.mark.parametrize("h, w", [(97, 70), (64, 200), (129, 129)])
def test_picture_is_the_area_mean_then_halvings(h, w):
    """Against the closed form of the area mean in float64, and numpy's halvings."""
    pixels, size = _noise(h, w), 16
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = pixels[top : top + side, left : left + side].astype(np.float64)
    largest = max(size * 2**k for k in range(9) if size * 2**k <= side)
    weights = _area_weights(largest, side)
    mean = np.einsum("ai,bj,ijc->abc", weights, weights, square)
    resized = preprocess.picture(_file(pixels), largest).numpy()
    # Half a unit of rounding, and float32's error in a sum of nine.
    assert np.abs(resized - mean).max() <= 0.5 + 1e-3
    have = preprocess.picture(_file(pixels), size).numpy()
    np.testing.assert_array_equal(have, downsample(resized, size))


@pytest.mark.parametrize("h, w", [(150, 131), (64, 64), (300, 257)])
def test_stages_of_a_cascade_see_one_picture(h, w):
    data = _file(_noise(h, w))
    sr = preprocess.picture(data, 64).numpy()
    np.testing.assert_array_equal(
        preprocess.picture(data, 16).numpy(), downsample(sr, 16)
    )


def test_a_picture_of_the_right_size_is_left_alone():
    pixels = _noise(64, 64)
    np.testing.assert_array_equal(preprocess.picture(_file(pixels), 64), pixels)


def test_half_is_rounded_to_even():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[::2, ::2] = np.arange(8)[:, None, None] * 2  # means 0, 0.5, 1, 1.5, ...
    want = np.round(np.arange(8) * 0.5).astype(np.uint8)
    have = preprocess.picture(_file(pixels), 8).numpy()
    np.testing.assert_array_equal(have, np.broadcast_to(want[:, None, None], (8, 8, 3)))


def test_decode():
    grey = _noise(9, 7)[:, :, 0]
    decoded = preprocess.decode(_file(grey)).numpy()
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, 2))
    smooth = np.linspace(0, 255, 40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    jpeg = _file(smooth, "JPEG", quality=95)
    want = np.asarray(Image.open(io.BytesIO(jpeg)), int)
    # Decoders may differ by a rounding in the DCT and one in the colours.
    assert np.abs(preprocess.decode(jpeg).numpy() - want).max() <= 2


@pytest.mark.parametrize("dtype", embeddings.DTYPES)
def test_padded_text_is_pad_text(dtype):
    rng = np.random.default_rng(0)
    for n in (1, 5, 8):
        row = rng.normal(size=(n, 6)).astype(ml_dtypes.bfloat16)
        data = embeddings.to_bytes(row, dtype)
        stored = embeddings.from_bytes(data, 6, dtype)
        want_text, want_mask = pad_text([stored], 5, 6)
        have_text, have_mask = preprocess.padded_text(data, 5, 6, dtype)
        np.testing.assert_array_equal(have_text.numpy(), want_text[0])
        np.testing.assert_array_equal(have_mask.numpy(), want_mask[0])


@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (64, 64)])
def test_the_square_may_start_elsewhere(shape):
    image, extra = _noise(*shape), max(shape) - 64
    for start in {0, extra // 3, extra}:
        have = preprocess.picture(
            _file(image), 64, lambda extra, s=start: min(s, extra)
        )
        top, left = (start, 0) if shape[0] > 64 else (0, start)
        np.testing.assert_array_equal(have, image[top : top + 64, left : left + 64])


NOISY = """
import sys
import jax  # which sets TF_CPP_MIN_LOG_LEVEL
from imagen_jax.data import start_tensorflow
start_tensorflow()
from imagen_jax.data import preprocess
print(preprocess.sides(open(sys.argv[1], "rb").read()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("level", "told"), [(None, False), ("0", True)])
def test_odd_colour_profiles_are_not_told(tmp_path, level, told):
    """Unless somebody asks TensorFlow for everything."""
    path = tmp_path / "x.png"
    Image.new("RGB", (9, 8)).save(path, icc_profile=b"no profile")
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", NOISY, str(path)],
        env=env | ({"TF_CPP_MIN_LOG_LEVEL": level} if level else {}),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(9, 8)\n", done.stderr
    assert ("iCCP" in done.stderr) == told, done.stderr
