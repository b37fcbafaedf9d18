import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources as originals


def _folder(root, count):
    for i in range(count):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"grey {i}")
    return f"folder:{root}"


def _captions(opened):
    return [
        item.caption for number in range(opened.shards) for item in opened.read(number)
    ]


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_shards_divide_a_source(tmp_path, size):
    """Read alone, in any order or again, a shard is the same."""
    for source in (_folder(tmp_path, 7), "shapes:7"):
        opened = originals.open_originals(source, 8, 0, size)
        assert (opened.count, opened.shards) == (7, -(-7 // size))
        whole = _captions(originals.open_originals(source, 8, 0, 100))
        assert _captions(opened) == whole
        last = opened.shards - 1
        for _ in range(2):
            captions = [item.caption for item in opened.read(last)]
            assert captions == whole[last * size :]


def test_a_folder_is_shuffled_by_the_seed(tmp_path):
    source = _folder(tmp_path, 30)
    orders = [_captions(originals.open_originals(source, 8, s, 9)) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    in_order = [f"grey {i}" for i in range(30)]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(in_order)
    assert orders[0] != in_order


def test_the_sum_is_of_captions_and_lengths(tmp_path):
    def of():
        return originals.open_originals(f"folder:{tmp_path}", 8, 0, 9).sha256

    _folder(tmp_path, 3)
    sums = [of(), of()]
    (tmp_path / "0.txt").write_text("another")
    sums.append(of())
    Image.new("RGB", (5, 5)).save(tmp_path / "1.png")
    sums.append(of())
    assert sums[0] == sums[1] and len(set(sums)) == 3


def test_of_several_captions_each_place_is_taken_equally_often():
    taken = [originals.choose(["a", "b", "c"], number) for number in range(6)]
    assert taken == ["a", "b", "c", "a", "b", "c"]
    assert originals.choose([], 3) == ""


def test_no_files(tmp_path):
    with pytest.raises(UserError, match=r"no tar matches '.*\*.tar' .quote it"):
        originals.files_of(str(tmp_path / "*.tar"), "tar")
