import dataclasses
import itertools
import json
import logging
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
from imagen_jax.data.manifest import read_manifest
from imagen_jax.data.memory import make_memory
from imagen_jax.data.source import open_records, queue_bytes
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError
from imagen_jax.text import embeddings
from imagen_jax.text import encoders as text

FLIP = {"flip": True}

start_tensorflow()
import tensorflow as tf  # noqa: E402

from imagen_jax.data import preprocess  # noqa: E402
from imagen_jax.data import records as tasks  # noqa: E402
from imagen_jax.data.pipeline import make_pipeline  # noqa: E402


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Forty scenes in one file."""
    path = str(tmp_path_factory.mktemp("line") / "out")
    options = {"image_size": 8, "shard_examples": 40, "progress": False}
    prepare.prepare("shapes:40", path, **options)
    return path


def _take(stream, n):
    return [jax.tree.map(np.asarray, b) for b in itertools.islice(stream, n)]


def _ids(batches):
    return np.concatenate([batch.id for batch in batches]).tolist()


def _assert_equal(have, want):
    assert len(have) == len(want)
    jax.tree.map(np.testing.assert_array_equal, have, want)


def test_batches_are_what_was_prepared(stage, records, pictures, mesh):
    cfg = stage(records, batch_size=7)
    stream = make_pipeline(cfg, mesh)
    check_batch(next(stream), batch_spec(cfg))
    lines = [
        json.loads(line) for line in (pictures / "metadata.jsonl").open().readlines()
    ]
    encoder = text.load_encoder("tiny")
    for batch in _take(stream, 2):
        for image, row, mask, id in zip(batch.image, batch.text, batch.mask, batch.id):
            assert lines[id]["file_name"].startswith(f"{id:02d}")
            want, want_mask = text.embed(encoder, [lines[id]["text"]], 8)
            np.testing.assert_array_equal(row, want[0])
            np.testing.assert_array_equal(mask, want_mask[0])
            pixels = np.asarray(Image.open(pictures / lines[id]["file_name"]), float)
            h, w, _ = pixels.shape
            side = min(h, w)
            top, left = (h - side) // 2, (w - side) // 2
            square = pixels[top : top + side, left : left + side]
            # Every step keeps the mean but for its rounding, at most a half.
            gap = np.abs(image.mean((0, 1)) - square.mean((0, 1)))
            assert gap.max() < 2, lines[id]


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_batches_of_int8_embeddings(stage, pictures, tmp_path, mesh, name):
    """Both readers give what the bytes of a caption's embedding say."""
    output = str(tmp_path / name)
    options = {"embedding_dtype": "int8", "image_size": 31, "progress": False}
    prepare.prepare(f"folder:{pictures}", output, **options)
    manifest = read_manifest(output)
    assert 0 < manifest.cosine_error["mean"] < manifest.cosine_error["worst"] < 1e-3
    tokens = round(manifest.tokens_mean * manifest.examples)
    assert manifest.text_bytes == tokens * (64 + 4)
    lines = [
        json.loads(line) for line in (pictures / "metadata.jsonl").open().readlines()
    ]
    encoder = text.load_encoder("tiny")
    size = 31 if name.endswith("npz") else 16
    (batch,) = _take(open_records(stage(output, size, batch_size=7), mesh), 1)
    for row, mask, id in zip(batch.text, batch.mask, batch.id):
        (whole,) = encoder.encode([lines[id]["text"]], 8)
        want = embeddings.from_bytes(embeddings.to_bytes(whole, "int8"), 64, "int8")
        np.testing.assert_array_equal(row[mask], want)
        assert not row[~mask].any()


def test_an_epoch_has_every_example_once_in_another_order(stage, records, mesh):
    first, second, third = (
        _ids(_take(make_pipeline(stage(records, batch_size=7), mesh), 9)[i : i + 3])
        for i in (0, 3, 6)
    )
    for ids in (first, second, third):
        assert sorted(ids) == list(range(21))
    assert first != second and second != third and first != third


def test_equal_seeds_make_equal_batches(stage, records, mesh):
    cfg = stage(records)
    a, b = _take(make_pipeline(cfg, mesh), 8), _take(make_pipeline(cfg, mesh), 8)
    _assert_equal(a, b)
    other = make_pipeline(stage(records, data={"seed": 1}), mesh)
    assert _ids(_take(other, 5)) != _ids(a[:5])


@pytest.mark.parametrize("crop", [{}, {"lowres_size": 4, "crop_size": 8}])
@pytest.mark.parametrize("consumed", [0, 2, 7, 11])
def test_resuming_equals_never_stopping(stage, records, mesh, consumed, crop):
    """In the first epoch and in later ones (21 examples, batches of 4)."""
    cfg = stage(records, **crop)
    whole = make_pipeline(cfg, mesh)
    _take(whole, consumed)
    state = whole.get_state()
    resumed = make_pipeline(cfg, mesh)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    _assert_equal(_take(resumed, 3), _take(whole, 3))
    assert resumed.get_state() == whole.get_state() and len(state) < 400


def test_random_squares_change_from_epoch_to_epoch(stage, records, pictures, mesh):
    paths = enumerate(sorted(pictures.glob("*.[jp]*g")))
    sizes = {i: Image.open(path).size for i, path in paths}
    cfg = stage(records, batch_size=7, data={"square": "random"})
    seen = {}
    for batch in _take(make_pipeline(cfg, mesh), 12):
        for id, image in zip(batch.id.tolist(), batch.image):
            seen.setdefault(id, set()).add(image.tobytes())
    for id, squares in seen.items():
        height, width = sizes[id]
        assert (len(squares) > 1) == (height != width)
    middle = stage(records, batch_size=7)
    stream = make_pipeline(middle, mesh)
    with pytest.raises(UserError, match="data.square 'random', this run has 'middle'"):
        stream.set_state(make_pipeline(cfg, mesh).get_state())


def test_crops_change_from_epoch_to_epoch(stage, records, mesh):
    cfg = stage(records, batch_size=7, lowres_size=4, crop_size=8)
    whole = {
        b.id[i]: b.image[i]
        for b in _take(make_pipeline(stage(records), mesh), 6)
        for i in range(4)
    }
    crops = {}
    for batch in _take(make_pipeline(cfg, mesh), 12):
        assert batch.image.shape == (7, 8, 8, 3)
        for id, image in zip(batch.id, batch.image):
            crops.setdefault(id, set()).add(image.tobytes())
            places = {
                whole[id][top : top + 8, left : left + 8].tobytes()
                for top in (0, 4, 8)
                for left in (0, 4, 8)
            }
            assert image.tobytes() in places
    assert all(len(seen) > 1 for seen in crops.values())


def test_flips_are_asked_for(stage, records, mesh):
    """Half of the pictures, others in every epoch, in each stage the same."""
    plain, flipped, small = (
        _take(make_pipeline(stage(records, *sizes, data=data), mesh), 12)
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
    for id, turn in zip(_ids(plain), turned):
        by_id.setdefault(id, set()).add(bool(turn))
    assert sum(len(turns) == 2 for turns in by_id.values()) > 10


def test_a_batch_lies_over_the_mesh(stage, records):
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    cfg = stage(records, batch_size=8)
    batch = next(make_pipeline(cfg, mesh))
    assert batch.image.sharding == sharding.batch_sharding(mesh)
    assert {s.data.shape for s in batch.image.addressable_shards} == {(2, 16, 16, 3)}
    one = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    _assert_equal(_take([batch], 1), _take(make_pipeline(cfg, one), 1))


@pytest.mark.parametrize(
    "size, crop",
    [
        (32, {}),
        (16, {"data": {"flip": True}}),
        (32, {"lowres_size": 8, "crop_size": 16}),
    ],
)
def test_memory_has_the_same_batches(stage, records, npz, mesh, size, crop):
    """The same content for the same id, crops of the same epoch included."""
    cfg = stage(records, size, batch_size=3, **crop)
    batches = _take(make_pipeline(cfg, mesh), 15 // 3 if size == 32 else 21 // 3)
    disk = {id: (b, i) for b in batches for i, id in enumerate(b.id)}
    stream = make_memory(stage(npz, size, batch_size=3, **crop), mesh)
    for batch in _take(stream, 5):
        for i, id in enumerate(batch.id):
            other, j = disk[id]
            for field in ("image", "text", "mask"):
                np.testing.assert_array_equal(
                    getattr(batch, field)[i], getattr(other, field)[j]
                )
    if size == 32:
        assert set(_ids(batches)) == {b for b in range(21) if b % 7 not in (4, 6)}


def test_stages_share_their_pictures(stage, records, mesh):
    base, sr = (
        {
            id: image
            for b in _take(make_pipeline(stage(records, size, 3), mesh), 5)
            for id, image in zip(b.id, b.image)
        }
        for size in (8, 32)
    )
    shared = set(base) & set(sr)
    assert len(shared) >= 10
    for id in shared:
        np.testing.assert_array_equal(base[id], downsample(sr[id], 8))


def test_small_pictures_are_left_out_and_counted(stage, records, mesh, caplog):
    cfg = stage(records, 32, batch_size=5)
    with caplog.at_level(logging.WARNING):
        ids = _ids(_take(make_pipeline(cfg, mesh), 3))
    assert sorted(ids) == [i for i in range(21) if i % 7 not in (4, 6)]
    assert "6 of 21 pictures" in caplog.text and "image_size 32" in caplog.text
    assert "captions have more tokens" not in caplog.text
    with pytest.raises(UserError, match="all 21 pictures in .* largest has 131 pixels"):
        make_pipeline(stage(records, 256), mesh)


@pytest.mark.parametrize("kind, cut", [("records", "12 of 21"), ("npz", "9 of 15")])
def test_cut_captions_are_counted(stage, kind, cut, mesh, caplog, request):
    cfg = stage(request.getfixturevalue(kind), text={"length": 5, "dim": 64})
    with caplog.at_level(logging.WARNING):
        batch = next(open_records(cfg, mesh))
    assert batch.mask.shape == (4, 5)
    # Caption i has 4 + i % 5 tokens.
    message = f"{cut} captions have more tokens than config.text.length 5, at most 8"
    assert message in caplog.text


def test_resuming_decodes_nothing_that_it_skips(stage, records, mesh, tmp_path):
    """Pictures of garbage are passed by when they lie before the position."""
    manifest = read_manifest(records)
    shard = manifest.shards[0]["file"]
    task = tasks.make_task(records, manifest, 16)
    rows = list(task.source.get_dataset(shuffle=False).as_numpy_iterator())[:12]
    for row in rows[:8]:
        row["image"] = b"no picture"
    tasks.write_shard(tmp_path / shard, rows)
    values = json.loads((pathlib.Path(records) / "manifest.json").read_text())
    values["shards"] = [values["shards"][0] | {"examples": 12, "sides": {"64": 12}}]
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"examples": 12}))
    cfg = stage(str(tmp_path), data={"shuffle_examples": 1})
    stream = make_pipeline(cfg, mesh)
    state = json.loads(stream.get_state()) | {"batches": 2}
    stream.set_state(json.dumps(state).encode())
    stream._batches_from(2).__next__()
    with pytest.raises(Exception, match="Unknown image file format|decode"):
        next(make_pipeline(cfg, mesh))


@pytest.mark.parametrize("shuffle", [1, 4, 13])
def test_the_shuffle_buffer_is_as_large_as_the_config_says(stage, line, mesh, shuffle):
    """Of one file, whose numbers rise, none comes before the buffer has reached it."""
    cfg = stage(line, 8, batch_size=5, data={"shuffle_examples": shuffle})
    ids = _ids(_take(make_pipeline(cfg, mesh), 8))
    assert max(id - place for place, id in enumerate(ids)) == shuffle - 1


def test_no_more_is_decoded_than_queues_hold(stage, line, mesh, monkeypatch):
    """Five batches with that on the devices, one being filled, and two a thread."""
    whole, decoded = preprocess.picture, []
    log = lambda data: (decoded.append(0), data)[1]  # noqa: E731

    def picture(data, *arguments):
        data = tf.ensure_shape(tf.py_function(log, [data], tf.string), [])
        return whole(data, *arguments)

    monkeypatch.setattr(preprocess, "picture", picture)
    cfg = stage(line, 8, batch_size=8)
    stream = make_pipeline(cfg, mesh)
    for taken in (1, 20):
        while stream._consumed < taken:
            next(stream)
        before = -1
        while before != len(decoded):
            before = len(decoded)
            time.sleep(0.5)
        assert len(decoded) <= (taken + 6) * 8 + 2 * min(os.cpu_count(), 32)
    records, example = read_manifest(line), 8 * 8 * 3 + 8 * (64 * 2 + 1) + 4
    stored = (records.image_bytes + records.text_bytes) / records.examples
    assert queue_bytes(cfg) == round(4 * stored) + 5 * 8 * example


class TestRefusals:
    def test_another_encoder(self, stage, records, mesh):
        cfg = stage(records)
        cfg = dataclasses.replace(cfg, text=config.TextConfig(8, 64, "t5_1_1_xxl@1"))
        for make in (make_pipeline, open_records):
            with pytest.raises(UserError, match="'tiny@.*is 't5_1_1_xxl@1'"):
                make(cfg, mesh)

    def test_damaged_files(self, stage, records, mesh, tmp_path):
        """Cut, and with one byte of a length changed."""
        name = "records-00002.tfrecord"
        whole = (pathlib.Path(records) / name).read_bytes()
        changed = whole[:3] + b"\xff" + whole[4:]
        for kind, data in (("cut", whole[:-9]), ("changed", changed)):
            shutil.copytree(records, tmp_path / kind)
            (tmp_path / kind / name).write_bytes(data)
            stream = make_pipeline(stage(str(tmp_path / kind)), mesh)
            with pytest.raises(UserError, match="is not what it was .*ecord"):
                _take(stream, 6)

    def test_another_width(self, stage, records, mesh):
        cfg = dataclasses.replace(stage(records), text=config.TextConfig(8, 32))
        with pytest.raises(UserError, match="width 64 .* config.text.dim is 32"):
            make_pipeline(cfg, mesh)

    def test_batches_that_do_not_divide(self, stage, records):
        mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:4])
        with pytest.raises(UserError, match="batch_size is 6.*4 shards"):
            make_pipeline(stage(records, batch_size=6), mesh)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"data": FLIP}, "data.flip None, this run has True"),
            ({"data": {"seed": 5}}, "data.seed 0, this run has 5"),
            ({"batch_size": 8}, "training.batch_size 4, this run has 8"),
            ({"data": {"shuffle_examples": 9}}, "shuffle_examples 4, this run has 9"),
            ({"image_size": 32}, "examples 21, this run has 15"),
        ],
    )
    def test_a_state_of_another_run(self, stage, records, mesh, change, message):
        state = make_pipeline(stage(records), mesh).get_state()
        with pytest.raises(UserError, match=message):
            make_pipeline(stage(records, **change), mesh).set_state(state)

    def test_a_state_of_other_records(self, stage, records, npz, mesh):
        state = make_pipeline(stage(records), mesh).get_state()
        with pytest.raises(UserError, match="records '.*same data"):
            make_memory(stage(npz), mesh).set_state(state)

    @pytest.mark.parametrize("state", [b"", b"\xff", b"{}", b"[1]", b"3"])
    def test_a_damaged_state(self, stage, records, mesh, state):
        with pytest.raises(UserError, match="data position is damaged"):
            make_pipeline(stage(records), mesh).set_state(state)
