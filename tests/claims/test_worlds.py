"""What the worlds ask for, drawn as asked, is judged right."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.claims import colours, worlds
from benchmarks.claims.worlds import Asked
from imagen_jax.shapes import scenes


def test_drawn_scenes_have_all_right_and_blank_ones_nothing():
    drawn = list(scenes.heldout(40, seed=3))
    asked = [Asked("", "", scenes.caption(scene)) for scene in drawn]
    pictures = np.stack([scenes.draw(scene, 16) for scene in drawn])
    right = worlds.judge_scenes(pictures, asked, None)
    assert np.mean(right["all"]) > 0.97 and np.mean(right["right"]) > 0.97
    assert right["relation"].count(None) == sum(not s.relation for s in drawn)
    blank = worlds.judge_scenes(np.full_like(pictures, 255), asked, None)
    for name in ("all", "right", "share"):
        assert not any(blank[name])
    turned = worlds.judge_scenes(pictures[::-1], asked, None)
    for i, share in enumerate(turned["share"]):
        own = [turned[k][i] for k in ("colour", "shape", "count", "size", "relation")]
        assert share == np.mean([value for value in own if value is not None])


def test_new_wordings_are_asked_of_trained_pairs():
    """So that words are asked, and not pairs of a colour and a shape, too."""
    for one in worlds.WORDINGS.ask(None):
        for _, colour, shape in scenes.parse(one.about).things:
            assert (colour, shape) not in scenes.HELD_OUT


def test_folders_are_written(tmp_path):
    examples = [(colours.draw((9, 8, 7), "ring", 16), "a dark ring")] * 2
    worlds.write_folder(tmp_path / "new", examples)
    lines = (tmp_path / "new/metadata.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert [row["text"] for row in rows] == ["a dark ring"] * 2
    with Image.open(tmp_path / "new" / rows[1]["file_name"]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), examples[1][0])


def test_relations_are_all_that_is_asked(tmp_path):
    asked = worlds.RELATIONS.ask(tmp_path)
    assert all(scenes.parse(one.about).relation for one in asked)


def test_enlarged_scenes_are_compared_with_those_drawn_large():
    asked = worlds.ENLARGED.ask(None)[:20]
    low = list(worlds.ENLARGED.start(asked))
    assert {picture.shape for picture in low} == {(16, 16, 3)}
    drawn = np.stack([scenes.draw(one.about, 32) for one in asked])
    right = worlds.ENLARGED.judge(drawn, asked, None)
    assert np.max(right["error"]) == 0 and np.allclose(right["detail"], 1)
    coarse = np.stack(low).repeat(2, 1).repeat(2, 2)
    wrong = worlds.ENLARGED.judge(coarse, asked, None)
    expected = np.abs(coarse.astype(float) - drawn).reshape(20, -1).mean(1)
    np.testing.assert_allclose(wrong["error"], expected)
    # Half of the steps between pixels are gone, and others are no higher for it.
    assert np.mean(wrong["detail"]) < 1 and np.mean(wrong["error"]) > 1


@pytest.fixture
def emoji(tmp_path):
    """Twenty pictures of flat colours, as a folder."""
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 256, (20, 2, 2, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    worlds.write_folder(tmp_path, ((p, f"emoji {i}") for i, p in enumerate(flat)))
    return tmp_path, flat


def test_emoji_are_found_and_others_are_not(emoji):
    folder, flat = emoji
    asked = worlds.EMOJI.ask(folder)
    assert {one.text for one in asked} == {f"emoji {i}" for i in range(20)}
    own = flat[[one.about for one in asked]]
    right = worlds.EMOJI.judge(own, asked, folder)
    assert np.mean(right["found"]) == 1 and np.max(right["chroma"]) == 0
    assert right["distance"] == [pytest.approx(0, abs=1e-3)]
    # Grey has no chroma: all of the emoji's is missed.
    grey = worlds.EMOJI.judge(np.full_like(own, 128), asked, folder)
    labs = colours.lab(own.reshape(20, -1, 3))
    expected = np.linalg.norm(labs[..., 1:], axis=-1).mean(1)
    np.testing.assert_allclose(grey["chroma"], expected, atol=0.01)
    assert grey["distance"][0] > 1000 and np.mean(grey["found"]) < 0.8
