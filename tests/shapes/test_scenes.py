"""Scenes against closed forms, and the judge against scenes that we know."""

import dataclasses
import itertools

import numpy as np
import pytest

from imagen_jax.batch import downsample
from imagen_jax.errors import UserError
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes.judge import judge, look

SCENES = list(shapes.generate(750, seed=7))


def request(scene):
    """What the caption of `scene` asks for."""
    things = tuple((i.size, i.colour, i.shape) for i in scene.items)
    return shapes.Request(things, scene.relation)


def one(shape, colour="blue", radius=0.3, x=0.5, y=0.5):
    return shapes.Scene((shapes.Item(shape, colour, "", x, y, radius),))


def is_right(verdict):
    """Whether all that is asked is met."""
    return False not in dataclasses.astuple(verdict)


def meets(picture, caption):
    """Whether the judge finds all that a caption demands."""
    return is_right(judge(picture, caption))


def spoil(picture, blur, sigma, seed):
    """A 3x3 blur that loses `blur` to each neighbour, then noise of `sigma`."""
    kernel = np.array([blur, 1 - 2 * blur, blur])
    image = np.pad(picture.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    image = sum(k * image[i : i + len(picture)] for i, k in enumerate(kernel))
    image = sum(k * image[:, i : i + len(picture)] for i, k in enumerate(kernel))
    image += np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_area_is_the_closed_form(shape, size):
    root3, w = 3**0.5, 1 / 3
    area = {
        "circle": np.pi,
        "square": 1.76**2,
        "triangle": 2 * root3 / 2,
        "cross": 2 * (2 * 2 * w) - (2 * w) ** 2,
        "ring": np.pi - np.pi / 4,
        "diamond": 2**0.5 * 2**0.5,
    }[shape]
    assert shapes.AREAS[shape] == pytest.approx(area)
    radius = 0.3
    picture = shapes.draw(one(shape, "black", radius, 0.47, 0.52), size).astype(float)
    covered = (255 - picture[..., 0]) / (255 - 20)
    # Straight edges are exact; a corner is wrong by under a pixel of the grid of 64,
    # and no shape has more than 12.
    assert covered.mean() == pytest.approx(area * radius**2, abs=4 / 64**2)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shape_reaches_its_radius_and_no_further(shape):
    rows, columns = np.nonzero((shapes.draw(one(shape), 200) < 128).any(-1))
    across = {"square": 0.88}.get(shape, 1)
    down = {"square": 0.88, "triangle": 3**0.5 / 2}.get(shape, 1)
    # Two pixels of 200 for the tips, which are half covered.
    assert np.ptp(columns) + 1 == pytest.approx(2 * 60 * across, abs=3)
    assert np.ptp(rows) + 1 == pytest.approx(2 * 60 * down, abs=3)
    assert columns.mean() == pytest.approx(99.5, abs=0.5)


def test_small_drawing_is_the_large_one_halved():
    for scene in SCENES[:100]:
        halved = downsample(shapes.draw(scene, 64), 16).astype(int)
        # Rounded at 64, at 32 and at 16: half a level each, and half for our own.
        assert np.abs(halved - shapes.draw(scene, 16)).max() <= 2


def test_drawing_at_a_resolution_of_no_power_of_two():
    areas = [
        (255 - shapes.draw(one("circle", "black"), size)[..., 0].astype(float)).mean()
        for size in (20, 50, 96, 128)
    ]
    assert areas == pytest.approx([235 * np.pi * 0.09] * 4, rel=0.005)


def test_scene_depends_on_seed_and_index_only():
    assert list(shapes.generate(20, 3)) == list(shapes.generate(50, 3))[:20]
    assert list(shapes.generate(20, 3)) != list(shapes.generate(20, 4))
    assert list(shapes.heldout(20, 3)) == list(shapes.heldout(50, 3))[:20]
    first = shapes.draw(SCENES[0], 32)
    np.testing.assert_array_equal(first, shapes.draw(SCENES[0], 32))


def test_held_out_pairs_are_never_trained_on_and_always_held_out():
    assert {c for c, _ in shapes.HELD_OUT} == set(shapes.COLOURS)
    assert {s for _, s in shapes.HELD_OUT} == set(shapes.SHAPES)
    assert len(shapes.HELD_OUT) == len(shapes.COLOURS)
    trained = set()
    for scene in shapes.generate(5000, seed=0):
        trained |= {(i.colour, i.shape) for i in scene.items}
    every = set(itertools.product(shapes.COLOURS, shapes.SHAPES))
    assert trained == every - shapes.HELD_OUT
    held = [(s.items[0].colour, s.items[0].shape) for s in shapes.heldout(500, seed=0)]
    assert set(held) == shapes.HELD_OUT


def test_kinds_of_scene_have_their_shares():
    scenes = list(shapes.generate(4000, seed=1))
    related = np.mean([bool(s.relation) for s in scenes])
    single = np.mean([len(s.items) == 1 for s in scenes])
    # Four standard deviations of a share p of 4000 are below 0.032.
    assert single == pytest.approx(0.65, abs=0.032)
    assert related == pytest.approx(0.15, abs=0.032)
    assert {s.relation for s in scenes} == {"", *shapes.RELATIONS}


def test_items_are_inside_and_apart():
    for scene in [*shapes.generate(2000, seed=2), *shapes.heldout(500, seed=2)]:
        for i in scene.items:
            assert i.radius < min(i.x, i.y, 1 - i.x, 1 - i.y)
        for a, b in itertools.combinations(scene.items, 2):
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
            assert apart > 1.25 / 16


def test_parse_inverts_caption():
    for scene in [*SCENES, *shapes.heldout(500, seed=7)]:
        assert shapes.parse(shapes.caption(scene)) == request(scene)


@pytest.mark.parametrize(
    ("text", "things", "relation"),
    [
        ("a red circle", [("", "red", "circle")], ""),
        ("an orange ring", [("", "orange", "ring")], ""),
        ("two green squares", [("", "green", "square")] * 2, ""),
        ("three small blue crosses", [("small", "blue", "cross")] * 3, ""),
        (
            "a small red circle above a blue square",
            [("small", "red", "circle"), ("", "blue", "square")],
            "above",
        ),
        (
            "a cyan ring right of a large black diamond",
            [("", "cyan", "ring"), ("large", "black", "diamond")],
            "right of",
        ),
    ],
)
def test_parse(text, things, relation):
    assert shapes.parse(text) == shapes.Request(tuple(things), relation)


@pytest.mark.parametrize(
    "text",
    ["", "a circle", "red circle", "a red dog", "two red circle", "a red circles"]
    + ["a red circle above", "a red circle near a blue square", "four red circles"],
)
def test_parse_refuses_other_text(text):
    with pytest.raises(UserError, match="is not a caption"):
        shapes.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32, 64])
def test_judge_is_right_on_drawn_scenes(size):
    right = [meets(shapes.draw(s, size), shapes.caption(s)) for s in SCENES[:400]]
    assert np.mean(right) >= 0.99


# At 16 pixels a stroke is a pixel or two wide, and a blur takes half of it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "blur", "share"), [(16, 0, 0.99), (16, 0.1, 0.98), (32, 0.15, 0.99)]
)
def test_judge_is_right_on_noisy_and_blurred_scenes(size, blur, share):
    right = [
        meets(spoil(shapes.draw(s, size), blur, 10, seed), shapes.caption(s))
        for seed, s in enumerate(SCENES[:400])
    ]
    assert np.mean(right) >= share


def test_judge_is_right_on_held_out_scenes():
    scenes = shapes.heldout(200, seed=7)
    assert all(meets(shapes.draw(s, 32), shapes.caption(s)) for s in scenes)


@pytest.mark.parametrize("size", [16, 32])
def test_every_shape_in_every_colour_is_told_from_the_others(size):
    for shape, colour in itertools.product(shapes.SHAPES, shapes.COLOURS):
        for radius in (0.15, 0.21, 0.38):
            scene = one(shape, colour, radius, 0.48, 0.53)
            (seen,) = look(shapes.draw(scene, size))
            assert (seen.shape, seen.colour) == (shape, colour)
            assert seen.radius == pytest.approx(radius, rel=0.08)
            assert (seen.x, seen.y) == pytest.approx((0.48, 0.53), abs=0.5 / size)


def other(rng, value, values):
    left = [v for v in values if v != value]
    return left[rng.integers(len(left))]


def wrong(scene, what, rng):
    """The caption of `scene` with one wrong word, or None where it has no such word."""
    items, relation = list(scene.items), scene.relation
    said = request(scene)
    if what == "count":
        if relation:
            items, relation = items[:1], ""
        else:
            items = items[:1] * other(rng, len(items), [1, 2, 3])
    elif what == "relation":
        if not relation:
            return None
        relation = other(rng, relation, shapes.RELATIONS)
    else:
        values = {"colour": shapes.COLOURS, "shape": shapes.SHAPES}
        values = values.get(what, ("small", "large"))
        old = getattr(items[0], what)
        if not old:
            return None
        new = other(rng, old, values)
        changed = len(items) if not relation else 1
        for k in range(changed):
            items[k] = dataclasses.replace(items[k], **{what: new})
    fake = shapes.Scene(tuple(items), relation)
    assert request(fake) != said
    return shapes.caption(fake)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["colour", "shape", "count", "size", "relation"])
def test_judge_refuses_wrong_captions(what):
    verdicts = []
    for seed, scene in enumerate(SCENES if what == "relation" else SCENES[:300]):
        text = wrong(scene, what, np.random.default_rng(seed))
        if text:
            verdicts.append(getattr(judge(shapes.draw(scene, 32), text), what))
    assert len(verdicts) > 100
    assert np.mean(verdicts) <= 0.01


def test_judge_binds_colours_to_shapes():
    circle = shapes.Item("circle", "red", "", 0.5, 0.25, 0.2)
    square = shapes.Item("square", "blue", "", 0.5, 0.75, 0.2)
    picture = shapes.draw(shapes.Scene((circle, square)), 32)
    assert meets(picture, "a red circle above a blue square")
    swapped = judge(picture, "a blue circle above a red square")
    assert swapped.colour and not swapped.shape


def test_judge_separates_touching_objects_of_two_colours():
    circle = shapes.Item("square", "red", "", 0.28, 0.5, 0.2)
    square = shapes.Item("square", "yellow", "", 0.28 + 0.4 * 0.88, 0.5, 0.2)
    for size in (16, 32, 64):
        picture = shapes.draw(shapes.Scene((circle, square)), size)
        assert meets(picture, "a red square left of a yellow square")


def near_blank(seed, side=32):
    """White with noise of a few levels, and three specks of a pixel or two."""
    rng = np.random.default_rng(seed)
    picture = 255 - np.abs(rng.normal(0, 6, (side, side, 3)))
    for row, column in rng.integers(0, side - 1, (3, 2)):
        picture[row, column : column + 2] = rng.integers(0, 256, 3)
    return picture.astype(np.uint8)


PICTURES = {
    "blank": lambda seed: np.full((32, 32, 3), 255, np.uint8),
    "near blank": near_blank,
    "noise": lambda seed: np.random.default_rng(seed).integers(
        0, 256, (32, 32, 3), np.uint8
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_judge_gives_no_credit_where_there_is_nothing_to_judge(name):
    """Neither for what is not seen nor for what is not asked."""
    for seed, scene in enumerate([*SCENES[:60], *shapes.heldout(20, seed=3)]):
        verdict = judge(PICTURES[name](seed), shapes.caption(scene))
        if name != "noise":
            assert look(PICTURES[name](seed)) == []
            assert True not in dataclasses.astuple(verdict)
        assert not is_right(verdict)
        asks_size = any(item.size for item in scene.items)
        assert (verdict.size is None) == (not asks_size)
        assert (verdict.relation is None) == (not scene.relation)


@pytest.mark.slow
def test_judge_gives_a_missing_object_no_size_and_no_relation():
    """One of two is drawn: the other, or the relation to it, is not there."""
    asked = 0
    for scene in SCENES:
        if len(scene.items) < 2:
            continue
        for shown in scene.items[:2]:
            picture = shapes.draw(shapes.Scene((shown,)), 32)
            verdict = judge(picture, shapes.caption(scene))
            assert not (verdict.count or verdict.size or verdict.relation)
            assert not is_right(verdict)
            asked += 1
    assert asked > 300


def test_judge_gives_another_object_no_size_and_no_relation():
    """Of neither the colour nor the shape that were asked for."""
    items = [
        shapes.Item("ring", "black", "", 0.25, 0.5, 0.16),
        shapes.Item("cross", "cyan", "", 0.75, 0.5, 0.16),
    ]
    picture = shapes.draw(shapes.Scene(tuple(items)), 32)
    verdict = judge(picture, "a small red circle left of a small blue square")
    assert verdict.count and not (verdict.size or verdict.relation)
    verdict = judge(picture, "a small black circle left of a small blue cross")
    assert verdict.size and verdict.relation and not is_right(verdict)


def test_judge_ignores_strays():
    picture = shapes.draw(one("circle", "red"), 64)
    picture[2:6, 2:6] = (0, 0, 0)
    assert meets(picture, "a red circle")
    picture[2:12, 2:12] = (0, 0, 0)
    assert not judge(picture, "a red circle").count
