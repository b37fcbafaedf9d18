import itertools

import numpy as np
import pytest

from imagen_jax.batch import downsample
from imagen_jax.data import order, start_tensorflow
from imagen_jax.errors import UserError

start_tensorflow()
import tensorflow as tf  # noqa: E402


def _turns(seed, weights, start, count):
    following = order.turns(seed, weights, start)[1]
    return np.array([*itertools.islice(following, count)])


class TestTurns:
    @pytest.mark.parametrize(
        "weights", [(3, 1), (0.7, 0.2, 0.1), (1, 1e-3), (1, 1, 1, 1), (5,), (1e9, 7e8)]
    )
    def test_weights_hold_everywhere(self, weights):
        """Each folder has its share, up to 1 + share * folders (docstring)."""
        turns = _turns(0, weights, 0, 20_000)
        places = np.arange(1, len(turns) + 1)
        for folder, share in enumerate(np.array(weights) / sum(weights)):
            gap = np.cumsum(turns == folder) - places * share
            assert np.abs(gap).max() < 1 + share * len(weights)

    @pytest.mark.parametrize("weights", [(3, 1), (0.7, 0.2, 0.1), (1, 1e-3)])
    @pytest.mark.parametrize("start", [1, 2, 3, 17, 4095, 4096, 4099, 9_999])
    def test_any_position_can_be_entered(self, weights, start):
        whole = _turns(3, weights, 0, start + 9_000)
        np.testing.assert_array_equal(_turns(3, weights, start, 9_000), whole[start:])
        counts = order.turns(3, weights, start)[0]
        assert counts == np.bincount(whole[:start], minlength=len(weights)).tolist()

    def test_a_position_after_years_too(self):
        """It is gone to at once: nothing before it is drawn."""
        position, weights = 10**11, (3, 1)
        counts, _ = order.turns(0, weights, position)
        turns = _turns(0, weights, position, 1000)
        later, _ = order.turns(0, weights, position + 1000)
        assert sum(counts) == position
        assert (np.subtract(later, counts) == np.bincount(turns)).all()

    def test_the_order_is_random_and_of_the_seed(self):
        """Of 3 : 1 the runs of the first folder vary in length."""
        turns = _turns(0, (3, 1), 0, 4000)
        assert (turns != _turns(1, (3, 1), 0, 4000)).any()
        gaps = np.diff(np.flatnonzero(turns == 1))
        # Of two numbers even in strata of 4 the difference is triangular on (0, 8).
        assert set(gaps) >= {1, 2, 3, 4, 5, 6, 7} and abs(gaps.mean() - 4) < 0.01

    def test_checkpoints_rely_on_this_order(self):
        """Positions in checkpoints mean these turns; they must never change."""
        turns = "".join(map(str, _turns(5, (3, 2, 0.7), 10**6, 60)))
        assert turns == "210010100102100102101000120101001010102010012100001201010201"


class TestReaders:
    @pytest.mark.parametrize(
        ("files", "batch", "count"),
        [
            ([[1000] * 100], 64, 8),
            ([[1000] * 100], 2048, 8),
            ([[1000] * 100], 12, 4),
            ([[1000] * 100], 7, 1),
            ([[1000] * 8], 64, 8),
            # Five of 4, 4, 4, 4 and nine to eight readers are unlike.
            ([[1000] * 5], 64, 1),
            ([[1000] * 9], 64, 1),
            ([[1000] * 19], 64, 2),
            ([[1000] * 100, [10]], 64, 1),
            ([[1000] * 100, [10] * 4], 64, 4),
            ([[10, 0, 10, 0]], 64, 1),
        ],
    )
    def test_default_blocks(self, unresolved, files, batch, count):
        assert order.count_blocks(unresolved(batch_size=batch), files) == count

    @pytest.mark.parametrize("count", [3, 16])
    def test_blocks_that_do_not_divide(self, unresolved, count):
        message = f"readers is {count}, which does not divide .*batch_size 8: use a div"
        with pytest.raises(UserError, match=message):
            order.count_blocks(unresolved(batch_size=8, data={"readers": count}), [])

    @pytest.mark.parametrize(
        ("shards", "blocks", "groups"),
        [
            ([5] * 64, 64, [5] * 64),
            ([5] * 640, 64, [50] * 64),
            ([5] * 63, 64, [10] * 31 + [5]),
            ([5] * 7, 12, [10] + [5] * 5),
            ([5], 64, [5]),
            # Of four groups two would have no image that is large enough.
            ([5, 0, 5, 0], 4, [10]),
            ([5, 5, 0, 5], 4, [5, 10]),
        ],
    )
    def test_groups(self, shards, blocks, groups):
        assert order.group_sizes(shards, blocks) == groups

    @pytest.mark.parametrize("reader", range(3))
    def test_seek(self, reader):
        """One record after the other, through groups of four, one and two."""
        groups, position = [4, 1, 2], 0
        for epoch in range(7):
            for place in range(groups[(reader + epoch) % 3]):
                assert order.seek(groups, reader, position) == (epoch, place)
                position += 1

    def test_a_host_reads_what_it_needs(self, unresolved):
        """Of two folders with eight readers and one: its own and all of the other."""
        cfg = unresolved(batch_size=8)
        opened, reads = order.host_reads(
            cfg, [1.0, 1.0], 8, [8, 1], np.array([4, 5]), 100
        )
        assert [(k, g) for k, g, _ in opened] == [(0, 4), (0, 5), (1, 0)]
        turns = [
            order.turns(cfg.data.seed % 2**32 * 1_000_003 + v, [1.0, 1.0], 100)
            for v in range(8)
        ]
        given = np.array([counts for counts, _ in turns])
        assert [p for *_, p in opened] == [given[4, 0], given[5, 0], given[:, 1].sum()]
        for _ in range(5):
            folders = [int(next(more)) for _, more in turns]
            source, own = next(reads)
            want = [
                (2 if folder else block - 4, block in (4, 5))
                for block, folder in enumerate(folders)
                if folder or block in (4, 5)
            ]
            assert list(zip(source.tolist(), own.tolist())) == want


def test_tensorflow_draws_what_numpy_does(unresolved):
    cfg = unresolved(
        image_size=64, lowres_size=16, crop_size=32, data={"square": "random"}
    )
    for pair in [(0, 0), (3, 1), (2**31, 2), (2**40 + 5, 2**33)]:
        id, epoch, extra = (np.int64(x) for x in (*pair, 136))
        tensors = tuple(tf.constant(x, tf.int64) for x in (id, epoch))
        assert order.crop_corner(cfg, *tensors) == order.crop_corner(cfg, id, epoch)
        assert order.is_flipped(cfg, *tensors) == order.is_flipped(cfg, id, epoch)
        want = order.square_start(cfg, id, epoch, extra)
        assert order.square_start(cfg, *tensors, tf.constant(extra)) == want


def test_squares_are_spread(unresolved):
    cfg = unresolved(image_size=64, data={"square": "random"})
    ids, epochs = np.arange(200)[:, None], np.arange(20)
    places = order.square_start(cfg, ids, epochs, ids * 0 + 15)
    counts = np.bincount(places.ravel(), minlength=16)
    # Chi-squared of 15 degrees of freedom: 5 standard deviations above its mean.
    assert ((counts - 250) ** 2 / 250).sum() < 15 + 5 * 30**0.5
    assert all(len(set(row)) > 5 for row in places)
    # Not those of the crops.
    crops = order.crop_corner(
        unresolved(image_size=64, lowres_size=16, crop_size=4), ids, epochs
    )
    assert np.abs(np.corrcoef(places.ravel(), crops[0].ravel())[0, 1]) < 5 / 4000**0.5
    assert order.square_start(unresolved(image_size=64), 5, 0, 9) == 4


class TestCrop:
    @pytest.fixture
    def cfg(self, unresolved):
        sizes = {"image_size": 64, "lowres_size": 16, "crop_size": 32}
        return unresolved(**sizes, data={"seed": 7})

    def test_corners_are_aligned_and_spread(self, cfg):
        ids, epochs = np.arange(300)[:, None], np.arange(10)
        rows, columns = order.crop_corner(cfg, ids, epochs)
        assert rows.shape == (300, 10)
        places = (64 - 32) // 4 + 1
        counts = np.zeros((places, places))
        np.add.at(counts, (rows // 4, columns // 4), 1)
        assert not (rows % 4).any() and not (columns % 4).any()
        # Chi-squared of 80 degrees of freedom: 5 standard deviations above its mean.
        expected = 3000 / places**2
        assert ((counts - expected) ** 2 / expected).sum() < 80 + 5 * (2 * 80) ** 0.5
        # Over the epochs of one image as well.
        assert all(len(set(r)) > 2 for r in rows)

    def test_seeds_differ(self, cfg, unresolved):
        other = unresolved(
            image_size=64, lowres_size=16, crop_size=32, data={"seed": 8}
        )
        ids = np.arange(100)
        rows = [order.crop_corner(c, ids, 0)[0] for c in (cfg, other)]
        assert (rows[0] != rows[1]).sum() > 50

    def test_low_res_of_a_crop_is_a_crop_of_the_low_res(self, cfg):
        image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        top, left = order.crop_corner(cfg, np.int64(5), np.int64(0))
        low_of_crop = downsample(image[top : top + 32, left : left + 32], 8)
        low = downsample(image, 16)
        top, left = top // 4, left // 4
        np.testing.assert_array_equal(low_of_crop, low[top : top + 8, left : left + 8])

    def test_checkpoints_rely_on_these_draws(self, cfg):
        rows, columns = order.crop_corner(cfg, np.arange(8), np.int64(3))
        assert rows.tolist() == [24, 24, 20, 16, 28, 24, 0, 32]
        assert columns.tolist() == [0, 20, 24, 16, 32, 32, 8, 4]
