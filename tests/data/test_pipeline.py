import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import config, prepare, sharding
from imagen_jax.batch import batch_spec, check_batch, downsample
from imagen_jax.data.manifest import read_manifest
from imagen_jax.data.pipeline import open_records, queue_bytes
from imagen_jax.errors import UserError
from imagen_jax.text import embeddings
from imagen_jax.text import encoders as text
from tests.data.batches import assert_equal, ids, take

BATCH = 8
# Which of eight rows each host holds; the last as axes of a mesh may lay them.
HOSTS = {
    "one": [range(8)],
    "two": [range(4), range(4, 8)],
    "four": [range(i, i + 2) for i in range(0, 8, 2)],
    "two, crossed": [(0, 1, 6, 7), (2, 3, 4, 5)],
}
FLIP = {"flip": True}


@pytest.fixture(scope="module")
def mixed(records, even):
    """Three of the 21 images to one of the 24 scenes."""
    return f"{records}:3,{even}:1"


def _by_id(batches):
    return {
        int(id): jax.tree.map(lambda x, i=i: x[i], batch)
        for batch in batches
        for i, id in enumerate(batch.id)
    }


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


class TestContents:
    @pytest.mark.parametrize("dtype", embeddings.DTYPES)
    def test_batches_are_what_was_prepared(
        self, stage, records, pictures, mesh, tmp_path, dtype
    ):
        if dtype == "int8":
            records = str(tmp_path / "int8")
            options = {"text_length": 8, "embedding_dtype": dtype, "progress": False}
            manifest = prepare.prepare(f"folder:{pictures}", records, **options)
            error = manifest.cosine_error
            assert 0 < error["mean"] < error["worst"] < 1e-3
            tokens = round(manifest.tokens_mean * manifest.examples)
            assert manifest.text_bytes == tokens * (64 + 4)
        cfg = stage(records, batch_size=7)
        batches = take(open_records(cfg, mesh), 3)
        check_batch(batches[0], batch_spec(cfg))
        lines = (pictures / "metadata.jsonl").read_text().splitlines()
        encoder = text.load_encoder("tiny")
        for id, row in _by_id(batches).items():
            line = json.loads(lines[id])
            (whole,) = encoder.encode([line["text"]], 8)
            want = embeddings.from_bytes(embeddings.to_bytes(whole, dtype), 64, dtype)
            np.testing.assert_array_equal(row.text[row.mask], want)
            assert not row.text[~row.mask].any() and row.mask[: len(want)].all()
            pixels = np.asarray(Image.open(pictures / line["file_name"]), float)
            h, w, _ = pixels.shape
            side = min(h, w)
            top, left = (h - side) // 2, (w - side) // 2
            square = pixels[top : top + side, left : left + side]
            # Every step keeps the mean but for its rounding, at most a half.
            gap = np.abs(row.image.mean((0, 1)) - square.mean((0, 1)))
            assert gap.max() < 2, line

    @pytest.mark.parametrize(
        "size, fields",
        [(16, {"data": FLIP}), (32, {"lowres_size": 8, "crop_size": 16})],
    )
    def test_memory_has_the_same_examples(
        self, stage, records, npz, mesh, size, fields
    ):
        """The same content for the same id, crops and flips of the epoch included."""
        cfg = stage(records, size, batch_size=3, **fields)
        disk = _by_id(take(open_records(cfg, mesh), 15 // 3 if size == 32 else 21 // 3))
        if size == 32:
            assert set(disk) == {b for b in range(21) if b % 7 not in (4, 6)}
        stream = open_records(stage(npz, size, batch_size=3, **fields), mesh)
        for id, row in _by_id(take(stream, 5)).items():
            jax.tree.map(np.testing.assert_array_equal, row, disk[id])

    def test_stages_share_their_images(self, stage, records, mesh):
        base, sr = (
            _by_id(take(open_records(stage(records, size, 3), mesh), 5))
            for size in (8, 32)
        )
        shared = set(base) & set(sr)
        assert len(shared) >= 10
        for id in shared:
            np.testing.assert_array_equal(base[id].image, downsample(sr[id].image, 8))

    def test_squares_and_crops_change_from_epoch_to_epoch(
        self, stage, records, pictures, mesh
    ):
        paths = enumerate(sorted(pictures.glob("*.[jp]*g")))
        sizes = {i: Image.open(path).size for i, path in paths}
        whole = _by_id(take(open_records(stage(records), mesh), 6))
        crop = {"lowres_size": 4, "crop_size": 8}
        for fields in ({"data": {"square": "random"}}, crop):
            cfg = stage(records, batch_size=7, **fields)
            seen = {}
            for batch in take(open_records(cfg, mesh), 12):
                for id, image in zip(batch.id.tolist(), batch.image):
                    seen.setdefault(id, set()).add(image.tobytes())
                    if fields is crop:
                        assert image.tobytes() in {
                            whole[id].image[top : top + 8, left : left + 8].tobytes()
                            for top in (0, 4, 8)
                            for left in (0, 4, 8)
                        }
            for id, images in seen.items():
                height, width = sizes[id]
                assert (len(images) > 1) == (fields is crop or height != width)

    def test_flips_are_asked_for(self, stage, records, mesh):
        """Half of the images, others in every epoch, in each stage the same."""
        plain, flipped, small = (
            take(open_records(stage(records, *sizes, data=data), mesh), 12)
            for sizes, data in (((16, 7), {}), ((16, 7), FLIP), ((8, 7), FLIP))
        )
        turned = []
        for one, other, reduced in zip(plain, flipped, small):
            for image, mirrored, low in zip(one.image, other.image, reduced.image):
                turned.append((mirrored != image).any())
                want = image[:, ::-1] if turned[-1] else image
                np.testing.assert_array_equal(mirrored, want)
                np.testing.assert_array_equal(low, downsample(mirrored, 8))
        # 84 draws: within four standard deviations of a half.
        assert 23 < sum(turned) < 61
        by_id = {}
        for id, turn in zip(ids(plain), turned):
            by_id.setdefault(id, set()).add(bool(turn))
        assert sum(len(turns) == 2 for turns in by_id.values()) > 10

    def test_small_images_are_left_out_and_counted(self, stage, records, mesh, caplog):
        found = ids(take(open_records(stage(records, 32, batch_size=5), mesh), 3))
        assert sorted(found) == [i for i in range(21) if i % 7 not in (4, 6)]
        assert "6 of 21 images" in caplog.text and "image_size 32" in caplog.text
        message = "all 21 images in .* too small: .* largest has 131 pixels"
        with pytest.raises(UserError, match=message):
            open_records(stage(records, 256), mesh)

    def test_a_batch_lies_over_the_mesh(self, stage, records, mesh):
        four = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2), jax.devices()[:4])
        cfg = stage(records, batch_size=8)
        batch = next(open_records(cfg, four))
        assert batch.image.sharding == sharding.batch_sharding(four)
        shapes = {s.data.shape for s in batch.image.addressable_shards}
        assert shapes == {(2, 16, 16, 3)}
        assert_equal(take([batch], 1), take(open_records(cfg, mesh), 1))


class TestOrder:
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

    def test_resuming_on_other_numbers_of_hosts(self, stage, mixed, mesh):
        """1, 4, 2 crossed hosts, in mid-epoch: one order, one state."""
        cfg = stage(mixed, batch_size=BATCH, data={"readers": 2})
        whole, found, state = open_records(cfg, mesh), [], None
        want = take(whole, 6)
        for hosts in (HOSTS["one"], HOSTS["four"], HOSTS["two, crossed"]):
            streams = _open(cfg, mesh, hosts)
            for stream in streams:
                if state:
                    stream.set_state(state)
            found += _joined(streams, hosts, 2)
            states = {stream.get_state() for stream in streams}
            assert len(states) == 1
            state = states.pop()
        assert_equal(found, want)
        assert state == whole.get_state()

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

    def test_a_mixture_has_what_its_folders_have(
        self, stage, records, even, mixed, mesh
    ):
        """The content of each folder, once an epoch of it, by the weights."""
        cfg = stage(mixed, batch_size=4, data={"readers": 1})
        batches = take(open_records(cfg, mesh), 28)
        found = np.array(ids(batches))
        folders = found % 2
        assert np.abs(np.cumsum(folders) - np.arange(1, 113) / 4).max() < 1.5
        together = _by_id(batches)
        for folder, (path, count) in enumerate([(records, 21), (even, 24)]):
            own = found[folders == folder] // 2
            for epoch in range(len(own) // count):
                epoch_ids = own[epoch * count : (epoch + 1) * count]
                assert sorted(epoch_ids) == list(range(count))
            alone = open_records(stage(path, batch_size=3), mesh)
            for id, row in _by_id(take(alone, count // 3)).items():
                number = id * 2 + folder
                jax.tree.map(
                    np.testing.assert_array_equal,
                    together[number],
                    row.replace(id=np.int32(number)),
                )

    def test_weights_hold_for_every_block(self, stage, mixed, mesh):
        """Of 3 : 1 as many as `order.turns` promises, in orders of their own."""
        cfg = stage(mixed, batch_size=BATCH, data={"readers": 4})
        found = np.stack([batch.id for batch in take(open_records(cfg, mesh), 12)])
        turns = (found % 2).reshape(12, 4, 2).transpose(1, 0, 2).reshape(4, 24)
        gaps = np.cumsum(turns, 1) - np.arange(1, 25) / 4
        assert np.abs(gaps).max() < 1 + 2 / 4
        assert len({tuple(own) for own in turns}) == 4


def test_queues_are_as_large_as_the_config_says(stage, records, npz):
    manifest, example = read_manifest(records), 16 * 16 * 3 + 8 * (64 * 2 + 1) + 4
    stored = (manifest.image_bytes + manifest.text_bytes) / manifest.examples
    assert queue_bytes(stage(records)) == round(4 * stored) + 5 * 4 * example
    assert queue_bytes(stage(npz), hosts=2) == 2 * example


def test_a_host_that_reads_for_others_is_told(stage, one_file, mesh, caplog):
    cfg = stage(one_file, batch_size=8)
    open_records(cfg, mesh, np.arange(4))
    assert "as many records as it keeps" not in caplog.text
    open_records(cfg, mesh, np.arange(2))
    assert "reads 4 times as many records as it keeps" in caplog.text
    assert "config.data.readers" in caplog.text


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
        [b"", b"\xff", b"{}", b"[1]", b"3", b'{"batches": -1, "identity": {}}'],
    )
    def test_a_damaged_state(self, stage, npz, mesh, state):
        with pytest.raises(UserError, match="data position is damaged"):
            open_records(stage(npz), mesh).set_state(state)


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
