"""Records as a data set of TensorFlow Datasets: what `prepare` writes, and others'.

A data set can be trained on when its features are

  id: an integer, unique in the split.
  image: an Image, stored as JPEG or PNG.
  text: a Tensor `[None, D]` of bfloat16, encoding="bytes": the caption's embeddings
    without padding; or `[None, 4 + D]` of uint8, the bytes of `embeddings`' int8.

and its metadata has "encoder", the identity of the text encoder, and "min_side", the
pixels that the shorter side of every picture has at least.
"""

import hashlib
import json

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from imagen_jax.data import manifest, readers
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
    """What a data set holds; of one that `prepare` wrote, its own manifest.

    Args:
      name: a data set, as `open_builder` takes it.

    Raises:
      UserError: when there is no such data set, or its features are others.
    """
    builder, split = open_builder(name)
    folder = epath.Path(builder.data_dir)
    if (folder / manifest.FILE_NAME).is_file():
        return manifest.read_manifest(folder)
    info = builder.info
    wrong = _fault(info)
    if wrong:
        raise UserError(
            f"'tfds:{name}' is not for training as it is: {wrong}; `prepare "
            f"--source=tfds:{name}` makes records of pictures with captions"
        )
    text = info.features["text"]
    width, int8 = text.shape[-1], text.tf_dtype == tf.uint8
    found = info.splits[split]
    return Manifest(
        settings={"source": f"tfds:{name}"},
        source_sha256="",
        encoder=info.metadata["encoder"],
        text_dim=width - embeddings.SCALE_BYTES if int8 else width,
        embedding_dtype="int8" if int8 else "bfloat16",
        cosine_error={},
        examples=found.num_examples,
        text_bytes=0,
        image_bytes=found.num_bytes,
        tokens_max=0,
        tokens_mean=0.0,
        cut_captions=0,
        reencoded=0,
        skipped=0,
        skipped_files=[],
        shards=[
            {
                "file": file,
                "examples": examples,
                # Its content is known by the data set's name and version only.
                "sha256": _sha256(info.full_name, split, file, examples),
                "sides": {str(info.metadata["min_side"]): examples},
                "lengths": {},
            }
            for file, examples in zip(found.filenames, found.shard_lengths)
            if examples
        ],
    )


def make_source(name: str, split: str) -> seqio.TfdsDataSource:
    """The data set as `read_manifest` takes it; seqio knows its split as `split`.

    Pictures and embeddings stay the bytes that are stored.
    """
    builder, own = open_builder(name)
    return _Source(str(builder.data_dir), split, own)


class _Source(seqio.TfdsDataSource):
    """One whose shards can be tensors, and that reads ahead as a folder's."""

    supports_arbitrary_sharding = True

    def __init__(self, folder: str, split: str, own: str):
        super().__init__(tfds_data_dir=folder, read_only=True, splits={split: own})
        self._own = own

    def get_dataset(
        self, split=_SPLIT, shuffle=True, seed=None, shard_info=None, **_
    ) -> tf.data.Dataset:
        """Rows as they are stored; of n shards the i-th has the files i::n."""
        shard = shard_info or seqio.ShardInfo(0, 1)
        return self.tfds_dataset.builder.as_dataset(
            split=self._own,
            shuffle_files=shuffle,
            decoders={key: tfds.decode.SkipDecoding() for key in ("image", "text")},
            read_config=tfds.ReadConfig(
                shuffle_seed=seed,
                interleave_cycle_length=readers.open_files(shard.num_shards),
                interleave_block_length=1,
                num_parallel_calls_for_decode=1,
                skip_prefetch=True,
                try_autocache=False,
                input_context=tf.distribute.InputContext(shard.num_shards, shard.index),
            ),
        )


def _fault(info) -> str:
    features, metadata = info.features, info.metadata or {}
    missing = [key for key in ("id", "image", "text") if key not in features]
    if missing:
        return f"it lacks the features {', '.join(missing)}"
    if not isinstance(features["image"], tfds.features.Image):
        return "its feature image is no Image"
    if features["id"].shape or not features["id"].tf_dtype.is_integer:
        return "its feature id is no integer"
    text = features["text"]
    if (
        not isinstance(text, tfds.features.Tensor)
        or len(text.shape) != 2
        or text.tf_dtype not in (tf.bfloat16, tf.uint8)
        or text.get_serialized_info().tf_dtype != tf.string
    ):
        return (
            "its feature text is no Tensor [None, D] of bfloat16 with "
            'encoding="bytes" (the embeddings of a caption)'
        )
    if not isinstance(metadata.get("encoder"), str):
        return "its metadata has no 'encoder', the identity of its text encoder"
    if not isinstance(metadata.get("min_side"), int):
        return "its metadata has no 'min_side', the pixels that all sides have at least"
    return ""


def _sha256(*values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
