"""Grids of images."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax import images
from imagen_jax.errors import UserError


def numbered(count, size):
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, size, size, 3), np.uint8
    )


def test_every_picture_is_where_it_should_be():
    sheet = images.grid(numbered(5, 6), columns=3)
    assert sheet.shape == (4 + 2 * 10, 4 + 3 * 10, 3)
    for i in range(5):
        y, x = 4 + i // 3 * 10, 4 + i % 3 * 10
        assert (sheet[y : y + 6, x : x + 6] == i).all()
    assert (sheet[4 + 10 :, 4 + 2 * 10 :] == 255).all()


def test_captions_do_not_cover_pictures():
    captions = ["a long caption of many words", "b"]
    sheet = images.grid(numbered(2, 60), columns=2, captions=captions)
    assert (sheet[4:64, 4:64] == 0).all() and (sheet[4:64, 68:128] == 1).all()
    below = sheet[64:, 4:64]
    assert below.shape[0] > 2 * 13 and (below < 128).any()


def test_names_of_rows_stand_beside_them():
    captions = ["", "", "two words", "b"]
    sheet = images.grid(numbered(4, 60), 2, captions, ["first", "the second"])
    left = sheet.shape[1] - 2 * 64
    assert (sheet[4:64, left : left + 60] == 0).all()
    # No room is left below a row without captions.
    assert (sheet[68:128, left + 64 : left + 124] == 3).all()
    for top in (4, 68):
        assert (sheet[top : top + 60, :left] < 128).any()
    assert (sheet[128:] < 128).any() and sheet.shape[0] > 128 + 13


def test_enlarge_repeats_pixels():
    small = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)
    large = images.enlarge(small, 12)
    assert large.shape == (2, 12, 12, 3)
    np.testing.assert_array_equal(large[:, 1::4, 2::4], small)


def test_save_is_lossless(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    images.save(tmp_path / "x.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), picture)


@pytest.mark.parametrize("fonts", [None, 1])
def test_labels_in_any_language_can_be_told_apart(monkeypatch, fonts):
    """In a font that has their letters; where none has, as escapes."""
    known = images._fonts()[:fonts]
    monkeypatch.setattr(images, "_fonts", lambda: known)
    texts = ["красное", "красная", "قلب", "قلم", "心", "中", "é", "è", "\x07", "a"]
    sheets = {images.grid(numbered(1, 96), 1, [text]).tobytes() for text in texts}
    assert len(sheets) == len(texts)
    text, font = images._label("красное", 400)
    if len(images._fonts()) == 1:
        assert text == r"\u043a\u0440\u0430\u0441\u043d\u043e\u0435"
    elif text == "красное":
        assert not any(images._lacks(font, letter) for letter in text)
    # What no font has: a letter that Unicode has not given away.
    assert images._label("a\u0378", 200)[0] == r"a\u0378"


@pytest.mark.parametrize("text", ["x" * 500, "心" * 200, "a " * 300, "\n\u2028"])
def test_labels_stay_beside_their_pictures(text):
    """Lines are broken where there is no space, and long texts cut."""
    lines, font = images._label(text, 90)
    assert max(map(font.getlength, lines.split("\n"))) <= 90
    assert lines.count("\n") < 80


def test_a_title_stands_above_all():
    plain = images.grid(numbered(4, 40), 2)
    titled = images.grid(numbered(4, 40), 2, title="a red circle, seed 5")
    head = len(titled) - len(plain)
    assert head > 13 and (titled[:head] < 128).any()
    np.testing.assert_array_equal(titled[head + 4 :], plain[4:])


def test_read_reduces_by_means(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images.save(tmp_path / "x.png", picture)
    np.testing.assert_array_equal(images.read(tmp_path / "x.png"), picture)
    small = images.read(tmp_path / "x.png", 4)
    means = picture.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(small - means).max() <= 0.5
    with pytest.raises(UserError, match="y.png' cannot be read"):
        images.read(tmp_path / "y.png")
