import json
import os
import pathlib
import shutil
import time

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import config, prepare, sharding
from imagen_jax.batch import batch_spec, check_batch, downsample
from imagen_jax.data import start_tensorflow
from imagen_jax.data.manifest import read_manifest
from imagen_jax.data.pipeline import open_records
from imagen_jax.errors import UserError
from imagen_jax.text import embeddings
from imagen_jax.text import encoders as text
from tests.data.batches import assert_equal, by_id, ids, take

start_tensorflow()
import tensorflow as tf  # noqa: E402

from imagen_jax.data import preprocess  # noqa: E402
from imagen_jax.data import records as reading  # noqa: E402
from imagen_jax.preparing.tfds import write_info  # noqa: E402

FLIP = {"flip": True}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Forty scenes in one file."""
    path = str(tmp_path_factory.mktemp("line") / "out")
    options = {"image_size": 8, "shard_examples": 40, "text_length": 8}
    prepare.prepare("shapes:40", path, progress=False, **options)
    return path


@pytest.mark.slow
def test_resuming_decodes_nothing_that_it_skips(stage, records, mesh, tmp_path):
    """Images of garbage are passed by when they lie before the position."""
    manifest = read_manifest(records)
    shard = "records-00000.tfrecord"
    task = reading.make_task(records, manifest, 16)
    rows = list(task.source.get_dataset(shuffle=False).as_numpy_iterator())[:12]
    for row in rows[:8]:
        row["image"] = b"no picture"
    reading.write_shard(tmp_path / shard, rows)
    values = json.loads((pathlib.Path(records) / "manifest.json").read_text())
    values["shards"] = [values["shards"][0] | {"examples": 12, "sides": {"64": 12}}]
    del values["shards"][0]["bytes"]
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"examples": 12}))
    write_info(tmp_path, manifest, [12])
    cfg = stage(str(tmp_path), data={"shuffle_examples": 1})
    stream = open_records(cfg, mesh)
    next(stream._batches_from(2))
    with pytest.raises(UserError, match="Unknown image file format|decode"):
        next(stream)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [1, 4, 13])
def test_the_shuffle_buffer_is_as_large_as_the_config_says(stage, line, mesh, shuffle):
    """Of one file, whose numbers rise, none comes before the buffer has reached it."""
    cfg = stage(line, 8, batch_size=5, data={"shuffle_examples": shuffle})
    found = ids(take(open_records(cfg, mesh), 8))
    assert max(id - place for place, id in enumerate(found)) == shuffle - 1


def test_no_more_is_decoded_than_queues_hold(stage, line, mesh, monkeypatch):
    """Five batches with that on the devices, one being filled, and two a thread."""
    whole, decoded = preprocess.picture, []

    def count(data):
        decoded.append(0)
        return data

    def picture(data, *arguments):
        data = tf.ensure_shape(tf.py_function(count, [data], tf.string), [])
        return whole(data, *arguments)

    monkeypatch.setattr(preprocess, "picture", picture)
    cfg = stage(line, 8, batch_size=8)
    stream = open_records(cfg, mesh)
    for taken in (1, 20):
        while stream._consumed < taken:
            next(stream)
        before = -1
        while before != len(decoded):
            before = len(decoded)
            time.sleep(0.5)
        assert len(decoded) <= (taken + 6) * 8 + 2 * min(os.cpu_count(), 32)


class TestContents:
    @pytest.mark.slow
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
        for id, row in by_id(batches).items():
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

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "size, fields",
        [(16, {"data": FLIP}), (32, {"lowres_size": 8, "crop_size": 16})],
    )
    def test_memory_has_the_same_examples(
        self, stage, records, npz, mesh, size, fields
    ):
        """The same content for the same id, crops and flips of the epoch included."""
        cfg = stage(records, size, batch_size=3, **fields)
        disk = by_id(take(open_records(cfg, mesh), 15 // 3 if size == 32 else 21 // 3))
        if size == 32:
            assert set(disk) == {b for b in range(21) if b % 7 not in (4, 6)}
        stream = open_records(stage(npz, size, batch_size=3, **fields), mesh)
        for id, row in by_id(take(stream, 5)).items():
            jax.tree.map(np.testing.assert_array_equal, row, disk[id])

    def test_stages_share_their_images(self, stage, records, mesh):
        base, sr = (
            by_id(take(open_records(stage(records, size, 3), mesh), 5))
            for size in (8, 32)
        )
        shared = set(base) & set(sr)
        assert len(shared) >= 10
        for id in shared:
            np.testing.assert_array_equal(base[id].image, downsample(sr[id].image, 8))

    @pytest.mark.slow
    def test_squares_and_crops_change_from_epoch_to_epoch(
        self, stage, records, pictures, mesh
    ):
        paths = enumerate(sorted(pictures.glob("*.[jp]*g")))
        sizes = {i: Image.open(path).size for i, path in paths}
        whole = by_id(take(open_records(stage(records), mesh), 6))
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

    @pytest.mark.slow
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
        turns_by_id = {}
        for id, turn in zip(ids(plain), turned):
            turns_by_id.setdefault(id, set()).add(bool(turn))
        assert sum(len(turns) == 2 for turns in turns_by_id.values()) > 10

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


def _copy(records, place, change, old=False):
    """Records whose rows went through `change`, under a manifest that does not know.

    Without `old` the manifest is that of the records; with it, as release 0.1 wrote it,
    without the lengths of files.
    """
    shutil.copytree(records, place)
    manifest = json.loads((place / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = place / shard["file"]
        rows = [reading_rows(raw) for raw in tf.data.TFRecordDataset(str(path))]
        reading.write_shard(path, filter(None, map(change, rows)))
        if old:
            del shard["bytes"], shard["head_sha256"]
    (place / "manifest.json").write_text(json.dumps(manifest))
    return str(place)


def reading_rows(raw):
    features = tf.train.Example.FromString(raw.numpy()).features.feature
    return {
        name: (value.bytes_list.value or value.int64_list.value)[0]
        for name, value in features.items()
    }


def _break(*numbers):
    def change(row):
        half = {"image": row["image"][: len(row["image"]) // 2]}
        return row | half if row["id"] in numbers else row

    return change


class TestDamage:
    @pytest.mark.slow
    def test_the_next_record_takes_the_place_of_one_that_does_not_decode(
        self, stage, records, mesh, tmp_path, caplog
    ):
        path = _copy(records, tmp_path / "r", _break(3, 10), old=True)
        whole = take(open_records(stage(records, batch_size=7), mesh), 6)
        cfg = stage(path, batch_size=7)
        stream = open_records(cfg, mesh)
        found = take(stream, 6)
        for batch, want in zip(found, whole, strict=True):
            good = [i for i, id in enumerate(want.id) if id not in (3, 10)]
            for i in range(7):
                j = min((g for g in good if g >= i), default=good[0])
                np.testing.assert_array_equal(batch.id[i], want.id[j])
                np.testing.assert_array_equal(batch.image[i], want.image[j])
                np.testing.assert_array_equal(batch.text[i], want.text[j])
        for number in (3, 10):
            assert caplog.text.count(f"passed over record {number} of '{path}'") == 2
        # The position has the count; a resumed stream goes on with both.
        assert json.loads(stream.get_state())["damaged"] == 4
        first = open_records(cfg, mesh)
        take(first, 4)
        second = open_records(cfg, mesh)
        second.set_state(first.get_state())
        assert_equal(take(second, 2), found[4:])
        assert second.get_state() == stream.get_state()

    @pytest.mark.slow
    def test_not_more_than_the_config_allows(self, stage, records, mesh, tmp_path):
        path = _copy(records, tmp_path / "r", _break(3, 10), old=True)
        stream = open_records(stage(path, batch_size=7, data={"max_damaged": 1}), mesh)
        message = r"more than config.data.max_damaged=1 records .* now record \d+ of"
        with pytest.raises(UserError, match=message):
            take(stream, 6)
        path = _copy(records, tmp_path / "all", _break(*range(21)), old=True)
        with pytest.raises(UserError, match="no record of a batch can be decoded: rec"):
            next(open_records(stage(path, batch_size=7), mesh))

    @pytest.mark.parametrize(
        "change",
        [
            lambda row: None,
            lambda row: row if row["id"] % 2 else None,
            lambda row: row | {"id": row["id"] + 1},
            _break(3),
        ],
        ids=["emptied", "half", "other records", "one shorter"],
    )
    def test_files_that_are_not_those_of_the_manifest(
        self, stage, records, mesh, tmp_path, change
    ):
        path = _copy(records, tmp_path / "r", change)
        message = r"\d files of .* are not what its manifest says, first: records-0000"
        with pytest.raises(UserError, match=message):
            open_records(stage(path, batch_size=7), mesh)

    @pytest.mark.parametrize("keep", [0, 2], ids=["emptied", "half"])
    def test_missing_records_are_an_error_of_their_epoch(
        self, stage, records, mesh, tmp_path, keep
    ):
        path = _copy(
            records,
            tmp_path / "r",
            lambda row: row if row["id"] % 4 < keep else None,
            1,
        )
        with pytest.raises(UserError, match="damaged or gone: .*expected to contain"):
            take(open_records(stage(path, batch_size=7), mesh), 6)
