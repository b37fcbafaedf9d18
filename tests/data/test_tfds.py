"""TensorFlow Datasets, without downloading: mocked, and written here."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.batch import batch_spec, check_batch, pad_text
from imagen_jax.data import start_tensorflow
from imagen_jax.data.manifest import TFDS_FILES
from imagen_jax.data.pipeline import open_records, read_sources
from imagen_jax.errors import UserError
from imagen_jax.text import encoders as text

start_tensorflow()
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

from imagen_jax.data.tfds import open_builder  # noqa: E402

COUNT = 6


def _picture(i):
    file = io.BytesIO()
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    Image.fromarray(np.uint8(ramp / (i + 1))).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def _captions(i):
    return [f"picture {i} says {k}" for k in range(5)]


def _as_dataset(self, split, decoders=None, **kwargs):
    """Rows as coco_captions has them; the pictures are not decoded."""
    assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
    first, last = split.removeprefix("train[").removesuffix("]").split(":")
    rows = range(COUNT)[int(first) : int(last)]
    captions = [[c.encode() for c in _captions(i)] for i in rows]
    return tf.data.Dataset.from_tensor_slices(
        {"image": [_picture(i) for i in rows], "captions": {"text": captions}}
    )


@pytest.fixture
def coco(tmp_path):
    """`coco_captions` with its own features and six made up pictures."""
    builder = tfds.builder("coco_captions", data_dir=str(tmp_path))
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[COUNT],
        num_bytes=1,
        filename_template=tfds.core.ShardedFileTemplate(
            dataset_name="coco_captions",
            data_dir=builder.data_path,
            filetype_suffix="tfrecord",
        ),
    )
    builder.info.set_splits(tfds.core.splits.SplitDict([split]))
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)
    return tfds.testing.mock_data(as_dataset_fn=_as_dataset, data_dir=str(tmp_path))


def test_coco_captions_into_a_training_batch(coco, tmp_path, stage, mesh):
    output = str(tmp_path / "records")
    options = {"shard_examples": 4, "text_length": 8, "progress": False}
    with coco:
        manifest = prepare.prepare("tfds:coco_captions", output, **options)
    assert [shard["examples"] for shard in manifest.shards] == [4, 2]
    cfg = stage(output, batch_size=COUNT)
    batch = jax.tree.map(np.asarray, next(open_records(cfg, mesh)))
    check_batch(batch, batch_spec(cfg))
    assert sorted(batch.id) == list(range(COUNT))
    encoder = text.load_encoder("tiny")
    for image, row, mask, id in zip(batch.image, batch.text, batch.mask, batch.id):
        # The n-th picture with the n-th caption, and around.
        rows = encoder.encode([_captions(id)[id % 5]], cfg.text.length)
        want, want_mask = pad_text(rows, cfg.text.length, encoder.dim)
        np.testing.assert_array_equal(row, want[0])
        np.testing.assert_array_equal(mask, want_mask[0])
        pixels = np.asarray(Image.open(io.BytesIO(_picture(id))), float)[:, 5:35]
        assert np.abs(image.mean((0, 1)) - pixels.mean((0, 1))).max() < 2


def test_wrong_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tfds has no data set 'coco_caption'"):
        open_builder("coco_caption")
    with pytest.raises(
        UserError, match="'coco_captions' has no split 'train' .*tfds build"
    ):
        open_builder("coco_captions")


@pytest.fixture(scope="module")
def kept(records, tmp_path_factory):
    """Records where tfds finds them: DATA/NAME/VERSION."""
    data = tmp_path_factory.mktemp("data")
    shutil.copytree(records, data / "kept/1.0.0")
    tfds.core.add_data_dir(data)
    return "kept"


def test_records_are_a_data_set_for_everybody(kept, pictures):
    """Decoded by tfds alone, embeddings included."""
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    encoder = text.load_encoder("tiny")
    seen = []
    for row in tfds.load(kept, split="train").as_numpy_iterator():
        line = json.loads(lines[row["id"]])
        assert row["caption"].decode() == line["text"].strip()
        (want,) = encoder.encode([line["text"]], 128)
        np.testing.assert_array_equal(row["text"], want)
        with Image.open(pictures / line["file_name"]) as picture:
            assert row["image"].shape[:2] == picture.size[::-1]
            assert row["side"] == min(picture.size)
        seen.append(int(row["id"]))
    assert sorted(seen) == list(range(21))


@pytest.mark.slow
def test_training_from_a_data_set(kept, records, stage, mesh):
    """By seqio.TfdsDataSource: the folder's batches, on one host and on two."""
    data = {"readers": 2}
    folder = open_records(stage(records, batch_size=4, data=data), mesh)
    cfg = stage(f"tfds:{kept}", batch_size=4, data=data)
    rows = np.arange(4).reshape(2, 2)
    streams = [open_records(cfg, mesh), *(open_records(cfg, mesh, r) for r in rows)]
    seen = []
    for _ in range(13):
        want, whole, *halves = (
            jax.tree.map(np.asarray, next(stream)) for stream in (folder, *streams)
        )
        jax.tree.map(np.testing.assert_array_equal, whole, want)
        joined = jax.tree.map(lambda *x: np.concatenate(x), *halves)
        jax.tree.map(np.testing.assert_array_equal, joined, whole)
        seen += whole.id.reshape(2, 2).tolist()
    # Each reader has all of them in its 21 examples.
    for reader in (0, 1):
        assert sorted(np.ravel(seen[reader::2])[:21]) == list(range(21))
    resumed = open_records(cfg, mesh)
    resumed.set_state(streams[1].get_state())
    want = jax.tree.map(np.asarray, next(streams[0]))
    jax.tree.map(np.testing.assert_array_equal, next(resumed), want)


class Embedded(tfds.core.GeneratorBasedBuilder):
    """Somebody's data set with embeddings: what training asks of one, and no more."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    METADATA = {"encoder": "theirs@v1", "min_side": 30}  # noqa: RUF012

    def _info(self):
        text = tfds.features.Tensor(
            shape=(None, 8), dtype=tf.bfloat16, encoding="bytes"
        )
        features = {"id": np.int32, "image": tfds.features.Image(), "text": text}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(**self.METADATA),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            rows = np.full((i + 1, 8), i + 0.5, tf.bfloat16.as_numpy_dtype)
            yield i, {"id": i, "image": io.BytesIO(_picture(i)), "text": rows}


def test_training_from_somebody_elses_data_set(tmp_path, stage, mesh, monkeypatch):
    builder = Embedded(data_dir=str(tmp_path))
    options = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=options)
    monkeypatch.setattr(tfds, "builder", lambda name: builder)
    with pytest.raises(UserError, match="does not say how many tokens .*text.length"):
        stage("tfds:embedded")
    own = {"length": 4, "dim": 0}
    cfg = stage("tfds:embedded", batch_size=COUNT, text=own)
    assert (cfg.text.encoder, cfg.text.dim) == ("theirs@v1", 8)
    batch = jax.tree.map(np.asarray, next(open_records(cfg, mesh)))
    check_batch(batch, batch_spec(cfg))
    assert sorted(batch.id) == list(range(COUNT))
    for image, row, mask, id in zip(batch.image, batch.text, batch.mask, batch.id):
        assert mask.sum() == min(id + 1, 4) and (row[mask] == id + 0.5).all()
        pixels = np.asarray(Image.open(io.BytesIO(_picture(id))), float)[:, 5:35]
        assert np.abs(image.mean((0, 1)) - pixels.mean((0, 1))).max() < 2
    with pytest.raises(UserError, match="largest has 30 pixels"):
        open_records(stage("tfds:embedded", 32, text=own), mesh)
    # It promises more than it holds.
    monkeypatch.setitem(builder.info.metadata, "min_side", 64)
    with pytest.raises(UserError, match="an image is too small for the stage"):
        next(open_records(stage("tfds:embedded", 32, text=own), mesh))
    monkeypatch.delitem(builder.info.metadata, "min_side")
    with pytest.raises(
        UserError, match="cannot be trained on: .*metadata encoder and min_side"
    ):
        stage("tfds:embedded")


@pytest.mark.parametrize("file", TFDS_FILES)
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"splits": 3}', "\xff"])
def test_damaged_descriptions(records, tmp_path, stage, mesh, file, text):
    """What TensorFlow Datasets says of them has many types."""
    folder = shutil.copytree(records, tmp_path / "records")
    (folder / file).write_text(text, "latin1")
    stream = open_records(stage(str(folder), batch_size=7), mesh)
    with pytest.raises(UserError, match="dataset_info.json or features.json of .* is"):
        next(stream)


def test_a_data_set_in_a_mixture(kept, records):
    """A version is no weight; and its records are those of the folder."""
    one, other = read_sources(f"tfds:{kept}:1.0.0:2,{records}:1")
    assert (one.path, one.weight) == (f"tfds:{kept}:1.0.0", 2)
    assert one.manifest == other.manifest


def test_a_data_set_without_embeddings(coco):
    with coco, pytest.raises(UserError, match="needs the features .*`prepare --source"):
        read_sources("tfds:coco_captions")
