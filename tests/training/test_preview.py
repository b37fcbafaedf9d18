"""Previews: what lies where on the sheet, and what is sampled."""

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import images
from imagen_jax.batch import downsample
from imagen_jax.config import MeshConfig
from imagen_jax.sharding import make_mesh
from imagen_jax.training import preview as previews
from imagen_jax.training.metrics import MetricWriter, Stopwatch
from imagen_jax.training.preview import Preview, save_preview, sheet
from imagen_jax.training.state import create_state
from tests import tiny

SIDE = 128


def random(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), "u1")


def found(made, picture, rows):
    """The row and column at which the sheet shows a picture, enlarged."""
    large = images.enlarge(picture[None], SIDE)[0]
    left = made.shape[1] - 8 * (SIDE + 4)
    for x in range(left, made.shape[1] - SIDE + 1, SIDE + 4):
        for y in range(made.shape[0] - SIDE + 1):
            if (made[y, x : x + SIDE] == large[0]).all():
                assert (made[y : y + SIDE, x : x + SIDE] == large).all()
                return y, (x - left) // (SIDE + 4)
    raise AssertionError(f"the picture is not in {rows}")


def test_rows_are_labelled_and_each_picture_stands_above_its_caption():
    """Ten examples in two blocks, then two prompts, which have no real picture."""
    truth, made, small = random(10, 16), random(12, 16, 1), random(12, 8, 2)
    captions = tuple(f"caption {i}" for i in range(12))
    given = Preview(truth, None, None, captions)
    plain, enlarged = sheet(made, given, None), sheet(made, given, small)
    places = {
        kind: [found(enlarged, one, kind) for one in pictures]
        for kind, pictures in (("input", small), ("sampled", made), ("real", truth))
    }
    columns = [i % 8 for i in range(10)] + [0, 1]
    for kind, own in places.items():
        assert [column for _, column in own] == columns[: len(own)], kind
    for i, (y, _) in enumerate(places["sampled"]):
        assert places["input"][i][0] + SIDE + 4 == y
        if i < 10:
            assert places["real"][i][0] - SIDE - 4 == y
    assert enlarged.shape[0] == plain.shape[0] + 3 * (SIDE + 4)
    # Names stand at the left of their rows, captions below the last one.
    left = enlarged.shape[1] - 8 * (SIDE + 4)
    for y in {y for own in places.values() for y, _ in own}:
        assert (enlarged[y : y + SIDE, :left] < 128).any()
    for row, other in (("real", 10), ("sampled", 12)):
        y, column = places[row][other - 1]
        below = enlarged[y + SIDE : y + SIDE + 15, left + column * (SIDE + 4) :]
        assert (below < 128).any()


def test_pictures_of_any_size_have_128_pixels_or_more():
    for size, side in ((8, 128), (48, 144), (128, 128), (200, 200)):
        given = Preview(random(1, size), None, None, ("x",))
        made = sheet(random(1, size, 1), given, None)
        assert made.shape[0] == 4 + 2 * (side + 4) + 15


@pytest.mark.slow
def test_prompts_are_sampled_beside_the_examples(tmp_path, monkeypatch):
    """What is sampled for the examples does not depend on them."""
    cfg = tiny.sr_stage(model=tiny.ONE_LEVEL)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(cfg, mesh)
    batch = tiny.batch(cfg)
    seen = []

    def record(*args):
        seen.append(args)
        return np.zeros((256, 256, 3), np.uint8)

    monkeypatch.setattr(previews, "sheet", record)
    writer = MetricWriter(str(tmp_path), Stopwatch(), cfg)
    for prompts in (0, 3):
        own = [0, 1, *range(3, 3 + prompts)]
        text, mask = batch.text[own], batch.mask[own]
        given = Preview(batch.image[:2], text, mask, ("x",) * (2 + prompts))
        save_preview(cfg, str(tmp_path), state, given, mesh, writer)
    (alone, _, inputs), (beside, _, more) = seen
    np.testing.assert_array_equal(inputs, downsample(batch.image[:2], 8))
    np.testing.assert_array_equal(more, inputs[[0, 1, 0, 1, 0]])
    assert len(beside) == 5 and np.abs(beside[:2].astype(int) - alone).max() <= 1
    assert Image.open(tmp_path / "samples" / "00000000.png").size == (256, 256)
