"""Requests: their limits, their order, and what they show."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.api import desk
from imagen_jax.api.desk import Desk
from imagen_jax.errors import UserError
from tests.api import fake
from tests.test_sample import png_header

# What a page's fields give for two stages: each stage's own values.
OWN = [None] * 10


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: desk.checked(None, 9), "write a prompt first"),
        (lambda: desk.checked(" \n", 9), "write a prompt first"),
        (lambda: desk.checked("x" * 1234, 9), "has 1,234 characters: at most 9 are"),
        (lambda: desk.chosen(None, False), "from 0 to 4,294,967,295"),
        (lambda: desk.chosen(-1, False), "from 0 to 4,294,967,295"),
        (lambda: desk.chosen(2**32, False), "from 0 to 4,294,967,295"),
        (lambda: desk.chosen(float("nan"), False), "from 0 to 4,294,967,295"),
        (lambda: desk.weights("1, two"), "up to 8 weights with commas"),
        (lambda: desk.weights(""), "up to 8 weights with commas"),
        (lambda: desk.weights("1 " * 9), "up to 8 weights with commas"),
        (lambda: desk.read_picture(None), "this file is empty"),
    ],
)
def test_what_a_user_can_mend_is_told(refuse, message):
    with pytest.raises(UserError, match=message):
        refuse()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "this file is empty"),
        (b"some text", "no picture of a known format"),
        # Its header is all there is of it.
        (png_header(50_000, 50_000), "50,000 x 50,000 pixels: at most 64 million"),
        (png_header(8000, 8000), None),
    ],
)
def test_pictures_are_refused_by_their_headers(tmp_path, data, message):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    if message:
        with pytest.raises(UserError, match=message):
            desk.read_picture(path)
    else:
        assert desk.read_picture(path) == data


def test_what_is_taken():
    assert desk.checked(" a red\ncircle ", 12) == "a red\ncircle"
    assert desk.chosen(2.0**32 - 1, False) == 2**32 - 1
    assert desk.weights("1, 1.5,3 8") == [1, 1.5, 3, 8]
    assert len({desk.chosen(None, True) for _ in range(8)}) == 8
    values = [3.0, 25, "ddim", "static", None, 1.0, 16, "ddpm", "dynamic", 0.1]
    assert desk.settings(values) == {
        "guidance": [3.0, 1.0],
        "steps": [25, 16],
        "sampler": ["ddim", "ddpm"],
        "threshold": ["static", "dynamic"],
        "aug_level": [None, 0.1],
    }


def test_a_picture_appears_stage_by_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(desk, "_SECONDS", 0.02)
    front = Desk(fake.Cascade(seconds=0.1), tmp_path)
    old = [desk.Made("path", "prompt", 7)] * 24
    *shown, last = front.generate("a circle", 5, False, old, *OWN)
    colours = [[p if p is None else p[0, 0, 0] for p in one.pictures] for one in shown]
    seen = [list(pair) for pair in dict.fromkeys(map(tuple, colours))]
    # The estimates, which are brighter by one at the first step.
    assert seen[-3:] == [[5, None], [5, 6], [5, 5]]
    assert "stage 2 of 2, step 2" in {one.status for one in shown}
    assert all(one.history is None for one in shown)
    made, *rest = last.history
    assert (made.prompt, made.seed, rest) == ("a circle", 5, old[1:])
    assert last.pictures[1] == made.path and (last.pictures[0] == 5).all()
    for path in (made.path, *tmp_path.glob("*.png")):
        with Image.open(path) as image:
            assert image.info == {"prompt": "a circle", "seed": "5"}
            np.testing.assert_array_equal(image, np.full((16, 16, 3), 5))


def test_a_sheet_has_the_weights_of_the_first_stage(tmp_path):
    cascade = fake.Cascade()
    front = Desk(cascade, tmp_path)
    values = [3.0, None, None, None, None, 1.5, None, None, None, None]
    shown = list(front.compare("1, 4", "a circle", 5, False, [], *values))
    assert cascade.settings["guidance"] == [4, 1.5]
    sheets = [one.sheet for one in shown if one.sheet is not None]
    # Pictures of 96 pixels with 4 around each, and labels.
    assert [sheet.shape[1] for sheet in sheets] == [204, 204]
    assert (sheets[0][60, 50] == 5).all() and (sheets[1][60, 150] == 5).all()


def test_a_failure_is_only_its_own(tmp_path):
    front = Desk(fake.Cascade(), tmp_path)
    with pytest.raises(RuntimeError):
        list(front.generate("fail", 5, False, [], *OWN))
    assert list(front.generate("a circle", 5, False, [], *OWN))[-1].history


def test_turns_are_in_order_and_those_who_left_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(desk, "_SECONDS", 0.02)
    cascade = fake.Cascade(seconds=0.02)
    cascade.gate.clear()
    front = Desk(cascade, tmp_path)
    names = "abcde"
    requests = [front.generate(name, 5, False, [], *OWN) for name in names]
    for request in requests:
        assert next(request).status == "waiting for the first step"
    requests[2].close()  # waits
    requests[0].close()  # is at work, and ends at its next step
    cascade.gate.set()
    for request in (requests[4], requests[3], requests[1]):
        assert list(request)[-1].history
    assert cascade.asked == ["a", "b", "d", "e"]
    assert len(list(tmp_path.glob("*.png"))) == 3
