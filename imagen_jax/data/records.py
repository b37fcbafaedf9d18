"""The records on disk: how they are written, and the seqio task that reads them."""

import functools
import pathlib
import typing
from collections.abc import Iterable, Sequence

import seqio
import tensorflow as tf
from etils import epath

from imagen_jax.config import StageConfig
from imagen_jax.data import preprocess, readers, tfds_records
from imagen_jax.data.crop import is_flipped, square_corner
from imagen_jax.data.manifest import TFDS, Manifest

SPLIT = "train"
# image: the picture's JPEG or PNG file. caption: UTF-8. text: `embeddings.to_bytes`
# of its embeddings. side: pixels of the picture's shorter side.
FIELDS = {
    "id": tf.io.FixedLenFeature([], tf.int64),
    "image": tf.io.FixedLenFeature([], tf.string),
    "caption": tf.io.FixedLenFeature([], tf.string),
    "text": tf.io.FixedLenFeature([], tf.string),
    "side": tf.io.FixedLenFeature([], tf.int64),
}


def write_shard(path: pathlib.Path, rows: Iterable[dict[str, int | bytes]]) -> None:
    """Writes a TFRecord file of `rows`, dicts with the keys of `FIELDS`."""

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            features = tf.train.Features(
                feature={name: feature(row[name]) for name in FIELDS}
            )
            # Fields are a map, which has an order only when asked for one.
            example = tf.train.Example(features=features)
            writer.write(example.SerializePartialToString(deterministic=True))


class RecordsSource(seqio.DataSource):
    """The files of a folder of records."""

    # Of files only; seqio would ask for the list once more, and log numbers of shards,
    # which here can be tensors.
    supports_arbitrary_sharding = True

    def __init__(self, files: Sequence[str], examples: int):
        # Outside of the functions that read it, so that it is not in each of them.
        self._files = tf.constant(files)
        super().__init__([SPLIT], {SPLIT: examples})

    def list_shards(self, split: str) -> list[str]:
        """All files."""
        return [file.decode() for file in self._files.numpy()]

    def get_dataset(
        self, split=SPLIT, shuffle=True, seed=None, shard_info=None, **_
    ) -> tf.data.Dataset:
        """Rows with the keys of `FIELDS`; of n shards the i-th has the files i::n."""
        shard = shard_info or seqio.ShardInfo(0, 1)
        files = tf.data.Dataset.from_tensor_slices(self._files)
        files = files.shard(shard.num_shards, shard.index)
        if shuffle:
            files = files.shuffle(len(self._files), seed=seed)
        return files.interleave(
            lambda file: tf.data.TFRecordDataset(file).map(
                lambda row: tf.io.parse_single_example(row, FIELDS)
            ),
            cycle_length=readers.open_files(shard.num_shards),
            block_length=1,
            num_parallel_calls=tf.data.AUTOTUNE,
        )


def make_task(path: str, manifest: Manifest, image_size: int) -> seqio.Task:
    """The records of a folder, or of "tfds:NAME", whose pictures have `image_size`.

    The task is not registered: it belongs to who made it, and two of the same
    records do not collide.
    """
    if path.startswith(TFDS):
        source = tfds_records.make_source(path.removeprefix(TFDS), SPLIT)
    else:
        root = epath.Path(path)
        files = [str(root / shard["file"]) for shard in manifest.shards]
        source = RecordsSource(files, manifest.examples)
    return seqio.Task(
        f"records_{manifest.content_sha256[:16]}",
        source,
        output_features={
            "image": seqio.ContinuousFeature(dtype=tf.string, rank=0),
            "text": seqio.ContinuousFeature(dtype=tf.string, rank=0),
            "id": seqio.ContinuousFeature(dtype=tf.int64, rank=0),
        },
        preprocessors=[functools.partial(_usable, image_size=image_size)],
    )


def _usable(dataset, image_size):
    # Others' data sets have no sides; the manifest has one number for all of them.
    if "side" in dataset.element_spec:
        dataset = dataset.filter(lambda row: row["side"] >= image_size)
    return dataset.map(lambda row: row | {"id": tf.cast(row["id"], tf.int64)})


class StageFeatureConverter(seqio.FeatureConverter):
    """Raw records to the fields of a `Batch` (unbatched).

    They have their epoch, and whether their embeddings are int8.
    """

    TASK_FEATURES: typing.ClassVar = {
        "image": seqio.FeatureConverter.FeatureSpec(tf.string, rank=0),
        "text": seqio.FeatureConverter.FeatureSpec(tf.string, rank=0),
        "id": seqio.FeatureConverter.FeatureSpec(tf.int64, rank=0),
        "epoch": seqio.FeatureConverter.FeatureSpec(tf.int64, rank=0),
        "int8": seqio.FeatureConverter.FeatureSpec(tf.bool, rank=0),
    }
    MODEL_FEATURES: typing.ClassVar = {
        "image": seqio.FeatureConverter.FeatureSpec(tf.uint8, rank=3),
        "text": seqio.FeatureConverter.FeatureSpec(tf.bfloat16, rank=2),
        "mask": seqio.FeatureConverter.FeatureSpec(tf.bool, rank=1),
        "id": seqio.FeatureConverter.FeatureSpec(tf.int32, rank=0),
    }
    PACKING_FEATURE_DTYPES = None

    def __init__(self, cfg: StageConfig):
        super().__init__(pack=False)
        self._cfg = cfg

    def get_model_feature_lengths(self, task_feature_lengths):
        """Lengths of the `MODEL_FEATURES`, for seqio's checks."""
        lengths = {name: task_feature_lengths[name] for name in ("image", "text", "id")}
        return lengths | {"mask": task_feature_lengths["text"]}

    def _convert_features(self, ds, task_feature_lengths):
        cfg = self._cfg
        size = task_feature_lengths["text"], cfg.text.dim

        def convert(row):
            corner = functools.partial(square_corner, cfg, row["id"], row["epoch"])
            image = preprocess.picture(row["image"], cfg.image_size, corner)
            if cfg.crop_size:
                image = preprocess.crop(image, cfg, row["id"], row["epoch"])
            if cfg.data.flip:
                mirrored = is_flipped(cfg, row["id"], row["epoch"])
                image = tf.where(mirrored, image[:, ::-1], image)
            text, mask = tf.cond(
                row["int8"],
                lambda: preprocess.padded_text(row["text"], *size, "int8"),
                lambda: preprocess.padded_text(row["text"], *size, "bfloat16"),
            )
            id = tf.cast(row["id"], tf.int32)
            return {"image": image, "text": text, "mask": mask, "id": id}

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)
