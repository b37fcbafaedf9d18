import io

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.job import open_source
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Example, Problem


def _folder(root, count):
    for i in range(count):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"grey {i}")
    return f"folder:{root}"


def _open(source, seed=0, size=9):
    settings = Settings(source, "", image_size=8, seed=seed, shard_examples=size)
    return open_source(settings)


def _captions(opened):
    return [
        item.caption for number in range(opened.shards) for item in opened.read(number)
    ]


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_shards_divide_a_source(tmp_path, size):
    """Read alone, in any order or again, a shard is the same."""
    for source in (_folder(tmp_path, 7), "shapes:7", "wordings:7"):
        opened = _open(source, size=size)
        assert (opened.count, opened.shards) == (7, -(-7 // size))
        whole = _captions(_open(source, size=100))
        assert _captions(opened) == whole
        last = opened.shards - 1
        for _ in range(2):
            captions = [item.caption for item in opened.read(last)]
            assert captions == whole[last * size :]


def test_a_folder_is_shuffled_by_the_seed(tmp_path):
    source = _folder(tmp_path, 30)
    orders = [_captions(_open(source, s)) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    in_order = [f"grey {i}" for i in range(30)]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(in_order)
    assert orders[0] != in_order


def test_the_sum_is_of_captions_and_lengths(tmp_path):
    def of():
        return _open(f"folder:{tmp_path}").sha256

    _folder(tmp_path, 3)
    sums = [of(), of()]
    (tmp_path / "0.txt").write_text("another")
    sums.append(of())
    Image.new("RGB", (5, 5)).save(tmp_path / "1.png")
    sums.append(of())
    assert sums[0] == sums[1] and len(set(sums)) == 3


def test_no_files(tmp_path):
    with pytest.raises(UserError, match=r"no tar matches '.*\*.tar' .quote it"):
        sources.matching_files(str(tmp_path / "*.tar"), "tar", "*.tar")


def test_order_and_problems_are_kept():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")

    def read(i):
        if i == 7:
            raise OSError(5, "Input/output error")
        return file.getvalue() if i % 3 else b""

    items = [Example(i, f"{i}", "x", lambda i=i: read(i)) for i in range(200)]
    items[50] = Problem("50", "why")
    done = list(sources.verify_images(iter(items)))
    names = [x.name if isinstance(x, Problem) else x[0].name for x in done]
    assert names == [f"{i}" for i in range(200)]
    for i, item in enumerate(done):
        assert isinstance(item, Problem) == (not i % 3 or i in (7, 50)), i
    assert done[7].reason == "cannot be read: Input/output error"
    assert done[50].reason == "why"


def test_sources_are_not_read_far_ahead():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield Problem(f"{i}", "")

    next(sources.verify_images(items()))
    assert len(taken) < 100
