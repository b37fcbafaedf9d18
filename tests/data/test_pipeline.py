import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from imagen_jax import config, sharding
from imagen_jax.data.manifest import read_manifest
from imagen_jax.data.pipeline import open_batches, open_records
from imagen_jax.errors import UserError
from tests.data.batches import assert_equal, by_id, ids, take

BATCH = 8
# Which of eight rows each host holds; the last as axes of a mesh may lay them.
HOSTS = {
    "two": [range(4), range(4, 8)],
    "four": [range(i, i + 2) for i in range(0, 8, 2)],
    "two, crossed": [(0, 1, 6, 7), (2, 3, 4, 5)],
}
FLIP = {"flip": True}


@pytest.fixture(scope="module")
def mixed(records, even):
    """Three of the 21 images to one of the 24 scenes."""
    return f"{records}:3,{even}:1"


def _open(cfg, mesh, hosts):
    return [open_records(cfg, mesh, np.array(rows)) for rows in hosts]


def _joined(streams, hosts, n):
    """The next `n` global batches of hosts with these rows."""
    order = np.argsort(np.concatenate([list(rows) for rows in hosts]))
    parts = [take(stream, n) for stream in streams]
    return [
        jax.tree.map(lambda *x: np.concatenate(x)[order], *batches)
        for batches in zip(*parts)
    ]


class TestOrder:
    @pytest.mark.slow
    def test_an_epoch_has_every_example_once_in_another_order(
        self, stage, records, mesh
    ):
        cfg = stage(records, batch_size=7)
        batches = take(open_records(cfg, mesh), 9)
        epochs = [ids(batches[i : i + 3]) for i in (0, 3, 6)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(21))
        assert len(set(map(tuple, epochs))) == 3
        assert_equal(take(open_records(cfg, mesh), 3), batches[:3])
        other = open_records(stage(records, batch_size=7, data={"seed": 1}), mesh)
        assert ids(take(other, 3)) != epochs[0]

    def test_checkpoints_rely_on_this_order(self, stage, records, mesh):
        """Positions in checkpoints mean these examples; they must never change."""
        data = {"readers": 2, "seed": 3}
        stream = open_records(stage(records, data=data), mesh)
        found = ids(take(stream, 6))
        assert found == [
            10,
            8,
            12,
            5,
            15,
            18,
            20,
            6,
            0,
            17,
            14,
            9,
            16,
            4,
            19,
            3,
            13,
            7,
            1,
            11,
            2,
            12,
            8,
            10,
        ]
        assert json.loads(stream.get_state()) == {
            "batches": 6,
            "identity": {
                "records": read_manifest(records).content_sha256,
                "examples": 21,
                "data.seed": 3,
                "training.batch_size": 4,
                "data.shuffle_examples": 4,
                "data.readers": 2,
                "data.square": "middle",
            },
        }

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "crop"),
        [
            ("{records}", {}),
            ("{records}:3,{even}:1", {"lowres_size": 4, "crop_size": 8}),
        ],
    )
    def test_resuming_equals_never_stopping(
        self, stage, records, even, mesh, name, crop
    ):
        """In the first epoch and in later ones."""
        cfg = stage(name.format(records=records, even=even), **crop)
        whole, resumed, states = open_records(cfg, mesh), open_records(cfg, mesh), []
        batches = []
        for batch in itertools.islice(whole, 20):
            states.append(whole.get_state())
            batches += take([batch], 1)
        for consumed in (2, 7, 17):
            resumed.set_state(states[consumed - 1])
            assert resumed.get_state() == states[consumed - 1]
            assert_equal(take(resumed, 3), batches[consumed : consumed + 3])
            assert resumed.get_state() == states[consumed + 2]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "count", "hosts"),
        [
            # More readers than files, as many, fewer.
            ("{records}", 8, "two"),
            ("{even}", 8, "two, crossed"),
            ("{one_file}", 4, "four"),
            ("{records}:3,{even}:2,{one_file}:1", 4, "two, crossed"),
        ],
    )
    def test_hosts_together_have_the_batches_of_one(
        self, stage, records, even, one_file, mesh, name, count, hosts
    ):
        """Ids, pixels and text, in the first epoch and in later ones."""
        name = name.format(records=records, even=even, one_file=one_file)
        data = {"readers": count, "flip": True, "square": "random"}
        cfg = stage(name, batch_size=BATCH, data=data)
        streams = _open(cfg, mesh, HOSTS[hosts])
        want = take(open_records(cfg, mesh), 5)
        assert_equal(_joined(streams, HOSTS[hosts], 5), want)

    @pytest.mark.slow
    def test_resuming_on_other_numbers_of_hosts(self, stage, mixed, mesh):
        """1, 4, 1 hosts, in mid-epoch: one order, one state."""
        cfg = stage(mixed, batch_size=BATCH, data={"readers": 2})
        whole = open_records(cfg, mesh)
        take(whole, 2)
        four = _open(cfg, mesh, HOSTS["four"])
        for stream in four:
            stream.set_state(whole.get_state())
        assert_equal(_joined(four, HOSTS["four"], 2), take(whole, 2))
        (state,) = {stream.get_state() for stream in four}
        assert state == whole.get_state()
        one = open_records(cfg, mesh)
        one.set_state(state)
        assert_equal(take(one, 2), take(whole, 2))

    @pytest.mark.slow
    def test_readers_of_equal_groups(self, stage, even, mesh):
        """An epoch has every example once; a reader in as many epochs as groups.

        Default readers: eight files of three for batches of eight are eight.
        """
        batches = take(open_records(stage(even, batch_size=BATCH), mesh), 24)
        found = np.stack([batch.id for batch in batches])
        for epoch in range(8):
            own = found[epoch * 3 : (epoch + 1) * 3]
            assert sorted(own.ravel()) == list(range(24))
        for reader in range(8):
            assert sorted(found[:, reader]) == list(range(24))
        assert len({tuple(found[:, reader]) for reader in range(8)}) == 8

    def test_unequal_groups_are_made_up_for(self, stage, records, mesh):
        """Four readers of 6, 5, 5 and 5: each has all 21 once in its 21 examples."""
        cfg = stage(records, batch_size=4, data={"readers": 4})
        found = np.stack([batch.id for batch in take(open_records(cfg, mesh), 42)])
        for reader, half in itertools.product(range(4), range(2)):
            own = found[half * 21 : half * 21 + 21, reader]
            assert sorted(own) == list(range(21))

    @pytest.mark.slow
    def test_a_mixture_has_what_its_folders_have(
        self, stage, records, even, mixed, mesh
    ):
        """The content of each folder, once an epoch of it, by the weights."""
        cfg = stage(mixed, batch_size=4, data={"readers": 1})
        batches = take(open_records(cfg, mesh), 28)
        found = np.array(ids(batches))
        folders = found % 2
        assert np.abs(np.cumsum(folders) - np.arange(1, 113) / 4).max() < 1.5
        together = by_id(batches)
        for folder, (path, count) in enumerate([(records, 21), (even, 24)]):
            own = found[folders == folder] // 2
            for epoch in range(len(own) // count):
                epoch_ids = own[epoch * count : (epoch + 1) * count]
                assert sorted(epoch_ids) == list(range(count))
            alone = open_records(stage(path, batch_size=3), mesh)
            for id, row in by_id(take(alone, count // 3)).items():
                number = id * 2 + folder
                jax.tree.map(
                    np.testing.assert_array_equal,
                    together[number],
                    row.replace(id=np.int32(number)),
                )

    @pytest.mark.slow
    def test_weights_hold_for_every_block(self, stage, mixed, mesh):
        """Of 3 : 1 as many as `order.turns` promises, in orders of their own."""
        cfg = stage(mixed, batch_size=BATCH, data={"readers": 4})
        found = np.stack([batch.id for batch in take(open_records(cfg, mesh), 12)])
        turns = (found % 2).reshape(12, 4, 2).transpose(1, 0, 2).reshape(4, 24)
        gaps = np.cumsum(turns, 1) - np.arange(1, 25) / 4
        assert np.abs(gaps).max() < 1 + 2 / 4
        assert len({tuple(own) for own in turns}) == 4


def test_a_host_that_reads_for_others_is_told(stage, one_file, mesh, caplog):
    cfg = stage(one_file, batch_size=8)
    open_records(cfg, mesh, np.arange(4))
    assert "as many records as it keeps" not in caplog.text
    open_records(cfg, mesh, np.arange(2))
    assert "this host reads 4 times as many records as it keeps" in caplog.text
    assert "config.data.readers" in caplog.text


def test_each_position_is_opened_once(stage, npz, mesh):
    """What `first` has read comes next; `iter` begins to read where it stands."""
    whole, opened = take(open_records(stage(npz, batch_size=6), mesh), 4), []

    def own(start):
        opened.append(start)
        return iter(whole[start:])

    stream = open_batches(own, mesh)
    assert not opened
    stream.first(2)
    (first,) = take(stream, 1)
    after_one = stream.get_state()
    assert_equal([first, *take(stream, 1)], whole[:2])
    assert opened == [0]
    stream.set_state(after_one)
    assert opened == [0]
    iter(stream)
    assert opened == [0, 1]
    assert stream.first(6).id.tolist() == whole[0].id.tolist()
    assert_equal(take(stream, 3), whole[1:])
    assert opened == [0, 1, 0]


class TestRefusals:
    def test_other_text(self, unresolved, records, npz, mesh):
        for path in (records, npz):
            cfg = unresolved(path, text={"length": 5, "dim": 64})
            with pytest.raises(UserError, match="length is 5, .* have 8"):
                open_records(cfg, mesh)

    def test_batches_that_do_not_divide(self, stage, records, mesh):
        four = sharding.make_mesh(config.MeshConfig(), jax.devices()[:4])
        with pytest.raises(UserError, match="batch_size is 6.*4 shards"):
            open_records(stage(records, batch_size=6), four)
        with pytest.raises(UserError, match="readers is 3, which does not divide"):
            open_records(stage(records, batch_size=4, data={"readers": 3}), mesh)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"data": FLIP}, "data.flip None, this run has True"),
            ({"data": {"seed": 5}}, "data.seed 0, this run has 5"),
            ({"batch_size": 8}, "training.batch_size 4, this run has 8"),
            ({"data": {"shuffle_examples": 9}}, "shuffle_examples 4, this run has 9"),
            ({"data": {"readers": 4}}, "data.readers 2, this run has 4"),
            ({"data": {"square": "random"}}, "square 'middle', this run has 'random'"),
            ({"image_size": 32}, "examples 21, this run has 15"),
        ],
    )
    def test_a_state_of_another_run(self, stage, records, mesh, change, message):
        state = open_records(stage(records), mesh).get_state()
        with pytest.raises(UserError, match=message):
            open_records(stage(records, **change), mesh).set_state(state)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ("{0}:1,{1}:1", r"weights \[3.0, 1.0\], this run has \[1.0, 1.0\]"),
            ("{1}:3,{0}:1", "data position has records"),
            ("{0}", "data position has records"),
            ("{2}", "data position has records"),
        ],
    )
    def test_a_state_of_other_records(
        self, stage, records, even, npz, mixed, mesh, other, message
    ):
        state = open_records(stage(mixed), mesh).get_state()
        changed = open_records(stage(other.format(records, even, npz)), mesh)
        with pytest.raises(UserError, match=message):
            changed.set_state(state)

    @pytest.mark.parametrize(
        "state",
        [b"", b"\xff", b"{}", b"[1]", b"3", b'{"batches": 1, "identity": 2}'],
    )
    def test_a_damaged_state(self, stage, npz, mesh, state):
        with pytest.raises(UserError, match="data position is damaged"):
            open_records(stage(npz), mesh).set_state(state)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "a length", "a byte", "while it is read"])
def test_damaged_files(stage, records, mesh, tmp_path, damage):
    folder = pathlib.Path(shutil.copytree(records, tmp_path / "records"))
    stream = open_records(stage(str(folder)), mesh)
    if damage == "while it is read":
        next(stream)
    for path in folder.glob("*.tfrecord"):
        content = bytearray(path.read_bytes())
        if damage == "a length":
            content[3] ^= 255
        elif damage == "a byte":
            content[len(content) // 2] ^= 1
        else:
            del content[len(content) // 2 :]
        path.write_bytes(content)
    with pytest.raises(UserError, match="are damaged or gone: .*record"):
        take(stream, 100)


@pytest.mark.slow
def test_a_folder_that_goes_is_said_and_a_position_survives_it(
    stage, records, mesh, tmp_path
):
    """What is in the queues still comes; then a file of the next epoch is missed."""
    folder = pathlib.Path(shutil.copytree(records, tmp_path / "records"))
    cfg = stage(str(folder))
    stream = open_records(cfg, mesh)
    next(stream)
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="are damaged or gone: .*No such file"):
        for _ in range(100):
            position = stream.get_state()
            next(stream)
    shutil.move(tmp_path / "elsewhere", folder)
    stream.set_state(position)
    other = open_records(cfg, mesh)
    other.set_state(position)
    assert_equal(take(stream, 1), take(other, 1))
