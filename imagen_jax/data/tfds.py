"""Data sets of TensorFlow Datasets as records: those of `prepare`, and others'.

A data set can be trained on when its features are

  id: an integer, unique in the split.
  image: an Image, stored as JPEG or PNG.
  text: a Tensor `[None, D]` of bfloat16, encoding="bytes": the caption's embeddings
    without padding; or `[None, 4 + D]` of uint8, the bytes of int8 `embeddings`.

and its metadata has "encoder", the identity of the text encoder, and "min_side", the
least pixels of an image's shorter side.
"""

import hashlib
import json

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from imagen_jax.data import manifest, order
from imagen_jax.data.manifest import Manifest
from imagen_jax.errors import UserError
from imagen_jax.text import embeddings

_SPLIT = "train"


def open_builder(name: str) -> tuple[tfds.core.DatasetBuilder, str]:
    """A data set that is prepared in tfds' folder (TFDS_DATA_DIR), and its split.

    Args:
      name: as tfds knows it, like "coco_captions" or "coco_captions/2014:1.1.0"; a
        split other than "train" follows an "@".

    Raises:
      UserError: for an unknown or unprepared data set or split.
    """
    name, _, split = name.partition("@")
    split = split or _SPLIT
    try:
        builder = tfds.builder(name)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        brief = str(error).strip().splitlines()[0]
        raise UserError(f"tfds has no data set {name!r}: {brief}") from None
    splits = builder.info.splits
    if split not in splits or not splits[split].num_examples:
        there = f"it has {', '.join(splits)}" if splits else "it is not prepared"
        raise UserError(
            f"there is no split {split!r} of {name!r} in {builder.data_dir}: {there}; "
            f"`tfds build {name}` makes it, TFDS_DATA_DIR says where it lies"
        )
    return builder, split


def read_manifest(name: str) -> Manifest:
    """The manifest of a data set; one is made up unless `prepare` wrote it.

    Args:
      name: as in `open_builder`.

    Raises:
      UserError: when there is no such data set, or its features are others.
    """
    builder, split = open_builder(name)
    folder = epath.Path(builder.data_dir)
    if (folder / manifest.FILE_NAME).is_file():
        return manifest.read_manifest(folder)
    info, metadata = builder.info, builder.info.metadata or {}
    if not (
        _is_readable(info.features)
        and isinstance(metadata.get("encoder"), str)
        and isinstance(metadata.get("min_side"), int)
    ):
        raise UserError(
            f"'tfds:{name}' cannot be trained on: it needs the features id (an "
            "integer), image (an Image) and text (a Tensor [None, D] of bfloat16 with "
            'encoding="bytes", the embeddings) and the metadata encoder and min_side; '
            f"`prepare --source=tfds:{name}` makes records of images with captions"
        )
    text = info.features["text"]
    width, int8 = text.shape[-1], text.tf_dtype == tf.uint8
    found = info.splits[split]

    def shard(file: str, examples: int) -> dict:
        # The content is known by the data set's name and version only.
        content = json.dumps([info.full_name, split, file, examples])
        return {
            "file": file,
            "examples": examples,
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
            "sides": {str(metadata["min_side"]): examples},
            "lengths": {},
        }

    files = zip(found.filenames, found.shard_lengths)
    return Manifest(
        settings={"source": f"tfds:{name}"},
        encoder=metadata["encoder"],
        text_dim=width - embeddings.SCALE_BYTES if int8 else width,
        embedding_dtype="int8" if int8 else "bfloat16",
        examples=found.num_examples,
        image_bytes=found.num_bytes,
        shards=[shard(file, examples) for file, examples in files if examples],
    )


def _is_readable(features: tfds.features.FeaturesDict) -> bool:
    known = dict(features.items())
    id, image, text = (known.get(name) for name in ("id", "image", "text"))
    return (
        isinstance(image, tfds.features.Image)
        and isinstance(id, tfds.features.FeatureConnector)
        and not id.shape
        and id.tf_dtype.is_integer
        and isinstance(text, tfds.features.Tensor)
        and len(text.shape) == 2
        and text.tf_dtype in (tf.bfloat16, tf.uint8)
        and text.get_serialized_info().tf_dtype == tf.string
    )


def make_source(name: str, split: str) -> seqio.TfdsDataSource:
    """The data set as `read_manifest` describes it; seqio knows its split as `split`.

    Images and embeddings stay the bytes that are stored.
    """
    builder, own = open_builder(name)
    return _Source(str(builder.data_dir), split, own)


class _Source(seqio.TfdsDataSource):
    """A source whose shard number can be a tensor, and that reads ahead as a folder."""

    supports_arbitrary_sharding = True

    def __init__(self, folder: str, split: str, own: str):
        super().__init__(tfds_data_dir=folder, read_only=True, splits={split: own})
        self._own = own

    def get_dataset(
        self, split=_SPLIT, shuffle=True, seed=None, shard_info=None, **_
    ) -> tf.data.Dataset:
        """Rows as they are stored; shard i of n has the files i::n."""
        shard = shard_info or seqio.ShardInfo(0, 1)
        return self.tfds_dataset.builder.as_dataset(
            split=self._own,
            shuffle_files=shuffle,
            decoders={key: tfds.decode.SkipDecoding() for key in ("image", "text")},
            read_config=tfds.ReadConfig(
                shuffle_seed=seed,
                interleave_cycle_length=order.open_files(shard.num_shards),
                interleave_block_length=1,
                num_parallel_calls_for_decode=1,
                skip_prefetch=True,
                try_autocache=False,
                input_context=tf.distribute.InputContext(shard.num_shards, shard.index),
            ),
        )
