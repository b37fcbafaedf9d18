"""The colours of the survey, and their distances, against other libraries."""

import numpy as np
import pytest

from benchmarks.claims import colours
from imagen_jax.shapes import scenes

# skimage.color.rgb2lab of scikit-image 0.26.0.
RGB = [
    *([3, 9, 1], [208, 166, 233], [128, 155, 248], [186, 161, 139], [143, 239, 71]),
    *([208, 171, 0], [100, 219, 141], [8, 195, 186], [0, 0, 0], [255, 255, 255]),
]
LAB = [
    *([1.9594, -2.6815, 2.4749], [73.9113, 27.4674, -27.8214]),
    *([65.5977, 15.2007, -49.4276], [67.8686, 5.7204, 14.85]),
    *([86.0194, -54.9202, 68.6109], [71.2407, 0.4528, 73.9979]),
    *([79.2096, -50.6708, 28.4686], [71.2986, -41.7301, -6.9773]),
    *([0.0, 0.0, 0.0], [100.0, 0.0, 0.0]),
]


def test_cielab_is_that_of_scikit_image():
    np.testing.assert_allclose(colours.lab(np.array(RGB)), LAB, atol=0.01)


def test_the_survey_has_its_names():
    """Spot checks of https://xkcd.com/color/rgb.txt."""
    named = colours.named()
    assert len(named) == 949
    assert named["cloudy blue"] == (0xAC, 0xC2, 0xD9)
    assert named["dusty teal"] == (0x4C, 0x90, 0x85)
    assert named["robin's egg blue"] == (0x98, 0xEF, 0xF9)
    assert named["purple"] == (0x7E, 0x1E, 0x9C)


def test_150_names_are_never_trained_on():
    kinds = colours.kinds()
    held = {*kinds["names"], *kinds["words"]}
    assert len(held) == 150 and held.isdisjoint(kinds["learnt"])
    assert held | set(kinds["learnt"]) == set(colours.named())
    assert len(kinds["trained"]) == 150 and set(kinds["trained"]) <= set(
        kinds["learnt"]
    )
    learnt = {word for n in kinds["learnt"] for word in n.replace("/", " ").split()}
    new = [{*n.replace("/", " ").split()} - learnt for n in kinds["words"]]
    assert 25 <= len(new) <= 40 and all(new)
    assert "crimson" in kinds["words"]
    captions = " ".join(text for _, text in colours.examples(1))
    assert "crimson" not in captions


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_drawn_colour_is_right_and_another_is_not(shape):
    for name in (*colours.kinds()["trained"][:40], *colours.kinds()["words"]):
        picture = colours.draw(colours.named()[name], shape, 16)
        right = colours.judge(picture, name, shape)
        assert right == {"distance": pytest.approx(0, abs=1e-9), "near": 1.0}
        wrong = colours.draw((255, 0, 255), shape, 16)
        found = colours.judge(wrong, name, shape)
        own = colours.lab(colours.named()[name])
        # CIELAB of magenta, as published.
        magenta = np.array([60.3242, 98.2343, -60.8249])
        expected = np.linalg.norm(own - magenta)
        assert found["distance"] == pytest.approx(expected, abs=0.02)


def test_half_a_picture_is_grey():
    picture = colours.draw((255, 0, 0), "circle", 16)
    assert (picture[0, 0] == 127).all() and (picture[8, 8] == (255, 0, 0)).all()
    assert colours.caption("aqua", "ring") == "an aqua ring"
    assert len(list(colours.examples(1))) == 799 * 6


def test_prompts_ask_for_all_kinds():
    asked = list(colours.prompts(2))
    assert [kind for kind, *_ in asked].count("trained") == 300
    assert len(asked) == 600
    assert {name for kind, name, _ in asked if kind != "trained"} == {
        *colours.kinds()["names"],
        *colours.kinds()["words"],
    }
