"""Any number of hosts has together the batches of one."""

import itertools

import jax
import numpy as np
import pytest

from imagen_jax import prepare
from imagen_jax.data import mixture, readers
from imagen_jax.data.source import open_records
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

start_tensorflow()
from imagen_jax.data.pipeline import make_pipeline  # noqa: E402

BATCH = 8
# Which of eight rows each host holds; the last as axes of a mesh may lay them.
HOSTS = {
    "one": [range(8)],
    "two": [range(4), range(4, 8)],
    "four": [range(i, i + 2) for i in range(0, 8, 2)],
    "two, crossed": [(0, 1, 6, 7), (2, 3, 4, 5)],
}


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """24 scenes in eight files of three."""
    path = str(tmp_path_factory.mktemp("even") / "out")
    options = {"image_size": 16, "shard_examples": 3, "embedding_dtype": "int8"}
    prepare.prepare("shapes:24", path, progress=False, **options)
    return path


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """Nine scenes in one file."""
    path = str(tmp_path_factory.mktemp("one_file") / "out")
    prepare.prepare("shapes:9", path, image_size=16, progress=False)
    return path


def _take(stream, n):
    return [jax.tree.map(np.asarray, b) for b in itertools.islice(stream, n)]


def _joined(streams, hosts, n):
    """The next `n` global batches of hosts with these rows."""
    order = np.argsort(np.concatenate([list(rows) for rows in hosts]))
    parts = [_take(stream, n) for stream in streams]
    return [
        jax.tree.map(lambda *x: np.concatenate(x)[order], *batches)
        for batches in zip(*parts)
    ]


def _open(cfg, mesh, hosts):
    return [make_pipeline(cfg, mesh, np.array(rows)) for rows in hosts]


def _assert_equal(have, want):
    assert len(have) == len(want)
    jax.tree.map(np.testing.assert_array_equal, have, want)


@pytest.mark.parametrize(
    ("name", "count", "hosts"),
    [
        # More readers than files, as many, fewer.
        ("{records}", 8, "four"),
        ("{even}", 8, "four"),
        ("{even}", 2, "two, crossed"),
        ("{one_file}", 4, "four"),
        ("{records}:3,{even}:2,{one_file}:1", 8, "four"),
        ("{records}:3,{even}:2,{one_file}:1", 2, "two, crossed"),
    ],
)
def test_hosts_together_have_the_batches_of_one(
    stage, records, even, one_file, mesh, name, count, hosts
):
    """Ids, pixels and text, in the first epoch and in later ones."""
    name = name.format(records=records, even=even, one_file=one_file)
    data = {"readers": count, "flip": True, "square": "random"}
    cfg = stage(name, batch_size=BATCH, data=data)
    streams = _open(cfg, mesh, HOSTS[hosts])
    want = _take(make_pipeline(cfg, mesh), 9)
    _assert_equal(_joined(streams, HOSTS[hosts], 9), want)


@pytest.mark.parametrize("name", ["{records}", "{records}:3,{even}:1"])
def test_resuming_on_other_numbers_of_hosts(stage, records, even, mesh, name):
    """1, 2, 4, 2 crossed, 1 hosts, in mid-epoch: one order, one state."""
    cfg = stage(
        name.format(records=records, even=even), batch_size=BATCH, data={"readers": 4}
    )
    whole, found, state = make_pipeline(cfg, mesh), [], None
    want = _take(whole, 10)
    for hosts in (*HOSTS.values(), HOSTS["one"]):
        streams = _open(cfg, mesh, hosts)
        for stream in streams:
            if state:
                stream.set_state(state)
        found += _joined(streams, hosts, 2)
        states = {stream.get_state() for stream in streams}
        assert len(states) == 1
        state = states.pop()
    _assert_equal(found, want)
    assert state == whole.get_state()


def test_an_epoch_has_every_example_once(stage, even, mesh):
    """Of equal shares, all readers together; and each one in as many epochs as shares.

    Default readers: eight files of three for batches of eight are eight.
    """
    batches = _take(make_pipeline(stage(even, batch_size=BATCH), mesh), 24)
    ids = np.stack([batch.id for batch in batches])
    for epoch in range(8):
        own = ids[epoch * 3 : (epoch + 1) * 3]
        assert sorted(own.ravel()) == list(range(24))
    for reader in range(8):
        assert sorted(ids[:, reader]) == list(range(24))
    assert len({tuple(ids[:, reader]) for reader in range(8)}) == 8


def test_unequal_shares_are_made_up_for(stage, records, mesh):
    """Four readers of 6, 5, 5 and 5: each has all 21 once in its 21 examples."""
    cfg = stage(records, batch_size=4, data={"readers": 4})
    ids = np.stack([batch.id for batch in _take(make_pipeline(cfg, mesh), 42)])
    for reader, half in itertools.product(range(4), range(2)):
        assert sorted(ids[half * 21 : half * 21 + 21, reader]) == list(range(21))


def test_weights_hold_for_every_reader(stage, records, even, mesh):
    """Of 3 : 1 as many as `mixture.enter` promises, in orders of their own."""
    cfg = stage(f"{records}:3,{even}:1", batch_size=BATCH, data={"readers": 4})
    ids = np.stack([batch.id for batch in _take(make_pipeline(cfg, mesh), 12)])
    parts = (ids % 2).reshape(12, 4, 2).transpose(1, 0, 2).reshape(4, 24)
    gaps = np.cumsum(parts, 1) - np.arange(1, 25) / 4
    assert np.abs(gaps).max() < 1 + 2 / 4
    assert len({tuple(turns) for turns in parts}) == 4


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
    def test_default(self, stage, files, batch, count, records):
        cfg = stage(records, batch_size=batch)
        assert readers.count_readers(cfg, files) == count

    @pytest.mark.parametrize(
        ("files", "count", "streams"),
        [
            ([5] * 64, 64, 64),
            ([5] * 10_000, 64, 64),
            ([5] * 63, 64, 32),
            ([5] * 7, 12, 6),
            ([5], 64, 1),
            # Of four shares two would have no picture that is large enough.
            ([5, 0, 5, 0], 4, 1),
            ([5, 5, 0, 5], 4, 2),
        ],
    )
    def test_streams(self, files, count, streams):
        assert readers.count_streams(files, count) == streams

    @pytest.mark.parametrize("stream", range(3))
    def test_seek(self, stream):
        """One record after the other, through shares of four, one and two."""
        counts, position = [4, 1, 2], 0
        for epoch in range(7):
            for place in range(counts[(stream + epoch) % 3]):
                assert readers.seek(counts, stream, position) == (epoch, place)
                position += 1

    def test_a_host_reads_what_it_needs(self, stage, records):
        """Of two folders with eight streams and one: its own and all of the other."""
        cfg = stage(records, batch_size=8, data={"readers": 8})
        opened, choices = readers.enter(
            cfg, [1.0, 1.0], 8, [8, 1], np.array([4, 5]), 100
        )
        assert [(k, g) for k, g, _ in opened] == [(0, 4), (0, 5), (1, 0)]
        turns = [
            mixture.enter(cfg.data.seed % 2**32 * 1_000_003 + v, [1.0, 1.0], 100, 1)
            for v in range(8)
        ]
        given = np.array([counts for counts, _ in turns])
        assert [p for *_, p in opened] == [given[4, 0], given[5, 0], given[:, 1].sum()]
        for _ in range(5):
            parts = [int(next(more)[0]) for _, more in turns]
            source, own = next(choices)
            want = [
                (2 if part else reader - 4, reader in (4, 5))
                for reader, part in enumerate(parts)
                if part or reader in (4, 5)
            ]
            assert list(zip(source.tolist(), own.tolist())) == want


class TestRefusals:
    @pytest.mark.parametrize(
        ("count", "message"),
        [
            (3, "data.readers is 3, which does not divide .*batch_size 8: use .* 2,"),
            (16, "data.readers is 16, which does not divide .*batch_size 8: use .* 8,"),
        ],
    )
    def test_readers_that_do_not_divide(self, stage, records, mesh, count, message):
        cfg = stage(records, batch_size=8, data={"readers": count})
        with pytest.raises(UserError, match=message):
            open_records(cfg, mesh)

    @pytest.mark.parametrize("count", [-1, -8])
    def test_negative_readers(self, stage, records, count):
        with pytest.raises(UserError, match=f"data.readers is {count}; give a divisor"):
            stage(records, data={"readers": count})

    def test_a_state_of_other_readers(self, stage, records, mesh):
        cfg = stage(records, data={"readers": 4})
        state = make_pipeline(cfg, mesh).get_state()
        with pytest.raises(UserError, match="data.readers 4, this run has 2"):
            make_pipeline(stage(records), mesh).set_state(state)


def test_a_host_that_reads_for_others_is_told(stage, one_file, mesh, caplog):
    cfg = stage(one_file, batch_size=8)
    make_pipeline(cfg, mesh, np.arange(4))
    assert "as many records as it keeps" not in caplog.text
    make_pipeline(cfg, mesh, np.arange(2))
    assert "reads 4 times as many records as it keeps" in caplog.text
    assert "config.data.readers" in caplog.text
