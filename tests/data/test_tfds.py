"""TensorFlow Datasets, without downloading: mocked, and written here."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.batch import batch_spec, check_batch
from imagen_jax.data import text
from imagen_jax.data.source import open_records
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

start_tensorflow()
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

from imagen_jax.data import tfds_source  # noqa: E402

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
    with tfds.testing.mock_data(as_dataset_fn=_as_dataset, data_dir=str(tmp_path)):
        yield str(tmp_path)


def test_coco_captions_into_a_training_batch(coco, tmp_path, stage, mesh):
    output = str(tmp_path / "records")
    manifest = prepare.prepare(
        "tfds:coco_captions", output, shard_examples=4, progress=False
    )
    assert [shard["examples"] for shard in manifest.shards] == [4, 2]
    cfg = stage(output, batch_size=COUNT)
    batch = jax.tree.map(np.asarray, next(open_records(cfg, mesh)))
    check_batch(batch, batch_spec(cfg))
    assert sorted(batch.id) == list(range(COUNT))
    encoder = text.load_encoder("tiny")
    for image, row, mask, id in zip(batch.image, batch.text, batch.mask, batch.id):
        # The n-th picture with the n-th caption, and around.
        want, want_mask = text.embed(encoder, [_captions(id)[id % 5]], cfg.text.length)
        np.testing.assert_array_equal(row, want[0])
        np.testing.assert_array_equal(mask, want_mask[0])
        pixels = np.asarray(Image.open(io.BytesIO(_picture(id))), float)[:, 5:35]
        assert np.abs(image.mean((0, 1)) - pixels.mean((0, 1))).max() < 2


class Noted(tfds.core.GeneratorBasedBuilder):
    """Pictures with one caption, some unusable, in three files."""

    VERSION = tfds.core.Version("1.0.0")
    # Beside it tfds would look for checksums, with a package that it does not require.
    code_path = None

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(), "text": tfds.features.Text()}
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            caption = {2: "", 3: b"caf\xe9"}.get(i, f"picture {i}")
            yield i, {"image": io.BytesIO(_picture(i)), "text": caption}


def test_a_data_set_on_the_disk(tmp_path, monkeypatch):
    builder = Noted(data_dir=str(tmp_path))
    config = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=config)
    assert len(builder.info.splits["train"].filenames) == 3
    monkeypatch.setattr(tfds, "builder", lambda name: builder)
    for size in (2, 4, 100):
        opened = tfds_source.open_tfds("noted@test", size)
        assert opened.count == COUNT and opened.shards == -(-COUNT // size)
        items = [item for k in range(opened.shards) for item in opened.read(k)]
        names = [f"test[{i}]" for i in range(COUNT)]
        assert [item.name for item in items] == names
        reasons = [item.reason for item in items if hasattr(item, "reason")]
        assert sorted(reasons) == [
            "the caption is empty",
            "the caption is not UTF-8 text",
        ]
        good = [item for item in items if not hasattr(item, "reason")]
        by_caption = {item.caption: item.read() for item in good}
        # tfds shuffles when it writes; the file's own bytes are kept.
        assert by_caption == {
            f"picture {i}": _picture(i) for i in range(COUNT) if i not in (2, 3)
        }


def test_wrong_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tfds has no data set 'coco_caption'"):
        tfds_source.open_tfds("coco_caption", 10)
    with pytest.raises(UserError, match="'train' of 'coco_captions' .*not prepared"):
        tfds_source.open_tfds("coco_captions", 10)
