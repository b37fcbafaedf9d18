import functools
import io

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.batch import downsample, pad_text
from imagen_jax.data.crop import crop_corner, square_corner
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.text import embeddings

start_tensorflow()
import tensorflow as tf  # noqa: E402

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


@pytest.mark.parametrize("h, w", [(131, 150), (97, 70), (64, 200), (129, 129)])
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


class TestSquare:
    @pytest.mark.parametrize("shape", [(64, 200), (200, 64), (64, 64)])
    def test_tensorflow_cuts_where_numpy_does(self, stage, records, shape):
        cfg = stage(records, 64, data={"square": "random", "seed": 3})
        image, extra = _noise(*shape), max(shape) - 64
        for id, epoch in [(0, 0), (0, 1), (3, 1), (2**31, 2)]:
            at = int(square_corner(cfg, np.int64(id), np.int64(epoch), np.int64(extra)))
            top, left = (at, 0) if shape[0] > 64 else (0, at)
            have = preprocess.picture(
                _file(image),
                64,
                functools.partial(
                    square_corner,
                    cfg,
                    tf.constant(id, tf.int64),
                    tf.constant(epoch, tf.int64),
                ),
            )
            np.testing.assert_array_equal(have, image[top : top + 64, left : left + 64])

    def test_squares_are_spread(self, stage, records):
        cfg = stage(records, 64, data={"square": "random"})
        ids, epochs = np.arange(200)[:, None], np.arange(20)
        places = square_corner(cfg, ids, epochs, ids * 0 + 15)
        counts = np.bincount(places.ravel(), minlength=16)
        # Chi-squared of 15 degrees of freedom: 5 standard deviations above its mean.
        assert ((counts - 250) ** 2 / 250).sum() < 15 + 5 * 30**0.5
        assert all(len(set(row)) > 5 for row in places)
        # Not those of the crops.
        crops = crop_corner(
            stage(records, 64, lowres_size=16, crop_size=4), ids, epochs
        )
        assert (
            np.abs(np.corrcoef(places.ravel(), crops[0].ravel())[0, 1]) < 5 / 4000**0.5
        )
        middle = stage(records, 64)
        assert square_corner(middle, 5, 0, 9) == 4


class TestCrop:
    @pytest.fixture
    def cfg(self, stage, records):
        return stage(records, 64, lowres_size=16, crop_size=32, data={"seed": 7})

    def test_corners_are_aligned_and_spread(self, cfg):
        ids, epochs = np.arange(300)[:, None], np.arange(10)
        rows, columns = crop_corner(cfg, ids, epochs)
        assert rows.shape == (300, 10)
        places = (64 - 32) // 4 + 1
        counts = np.zeros((places, places))
        np.add.at(counts, (rows // 4, columns // 4), 1)
        assert not (rows % 4).any() and not (columns % 4).any()
        # Chi-squared of 80 degrees of freedom: 5 standard deviations above its mean.
        expected = 3000 / places**2
        assert ((counts - expected) ** 2 / expected).sum() < 80 + 5 * (2 * 80) ** 0.5
        # Over the epochs of one picture as well.
        assert all(len(set(r)) > 2 for r in rows)

    def test_seeds_differ(self, cfg, stage, records):
        other = stage(records, 64, lowres_size=16, crop_size=32, data={"seed": 8})
        ids = np.arange(100)
        assert (crop_corner(cfg, ids, 0)[0] != crop_corner(other, ids, 0)[0]).sum() > 50

    def test_tensorflow_cuts_where_numpy_does(self, cfg):
        image = _noise(64, 64)
        for id, epoch in [(0, 0), (3, 1), (2**40 + 5, 2**33)]:
            top, left = crop_corner(cfg, np.int64(id), np.int64(epoch))
            have = preprocess.crop(
                tf.constant(image),
                cfg,
                tf.constant(id, tf.int64),
                tf.constant(epoch, tf.int64),
            )
            np.testing.assert_array_equal(have, image[top : top + 32, left : left + 32])

    def test_low_res_of_a_crop_is_a_crop_of_the_low_res(self, cfg):
        image = _noise(64, 64)
        top, left = crop_corner(cfg, np.int64(5), np.int64(0))
        low_of_crop = downsample(image[top : top + 32, left : left + 32], 8)
        low = downsample(image, 16)
        top, left = top // 4, left // 4
        np.testing.assert_array_equal(low_of_crop, low[top : top + 8, left : left + 8])
