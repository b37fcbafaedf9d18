"""Data sets of TensorFlow Datasets as records: those of `prepare`, and others'.

docs/prepare.md has the features and metadata that training asks of a data set.
"""

import hashlib
import json

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from imagen_jax.data import manifest
from imagen_jax.data.manifest import TFDS, Manifest
from imagen_jax.errors import UserError
from imagen_jax.text import embeddings

_SPLIT = "train"
# Files that are read in turn, by all readers of a data set together.
_OPEN_FILES = 16


def open_builder(name: str) -> tuple[tfds.core.DatasetBuilder, str]:
    """A data set in tfds' folder (TFDS_DATA_DIR), and its split.

    `name` is like "coco_captions", "coco_captions/2014:1.1.0" or "coco_captions@val".
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
        raise UserError(
            f"{name!r} has no split {split!r} in {builder.data_dir}, only {[*splits]}: "
            f"prepare it with `tfds build {name}`, or set TFDS_DATA_DIR"
        )
    return builder, split


def read_manifest(name: str) -> Manifest:
    """The manifest of a data set; one is made up unless `prepare` wrote it."""
    builder, split = open_builder(name)
    folder = epath.Path(builder.data_dir)
    if (folder / manifest.FILE_NAME).is_file():
        return manifest.read_manifest(folder)
    info = builder.info
    features, metadata = dict(info.features.items()), info.metadata or {}
    text = features.get("text")
    if not (
        {"id", "image"} <= set(features)
        and {"encoder", "min_side"} <= set(metadata)
        and isinstance(text, tfds.features.Tensor)
        and text.get_serialized_info().tf_dtype == tf.string
    ):
        raise UserError(
            f"'tfds:{name}' cannot be trained on: it needs the features id, image and "
            "text (embeddings) and the metadata encoder and min_side (docs/prepare.md);"
            f" `prepare --source=tfds:{name}` makes records of images with captions"
        )
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
        }

    files = zip(found.filenames, found.shard_lengths)
    return Manifest(
        settings={"source": f"tfds:{name}"},
        encoder=metadata["encoder"],
        text_dim=width - embeddings.SCALE_BYTES if int8 else width,
        embedding_dtype="int8" if int8 else "bfloat16",
        examples=found.num_examples,
        image_bytes=found.num_bytes,
        scores=dict.fromkeys(features.get("scores", ()), 0),
        shards=[shard(file, examples) for file, examples in files if examples],
    )


def _open_folder(path: str) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder_from_directory(path)
        builder.info.splits[_SPLIT]
    except Exception as error:  # tfds has no error of its own for damaged files.
        raise UserError(
            f"{' or '.join(manifest.TFDS_FILES)} of {path!r} is damaged: "
            f"{str(error).strip().splitlines()[0]}: copy it again or prepare again"
        ) from None
    return builder


class DataSource(seqio.DataSource):
    """A data set whose images and embeddings stay the bytes that are stored."""

    # seqio would list the files once more and log shard numbers, here maybe tensors.
    supports_arbitrary_sharding = True

    def __init__(self, path: str):
        """Opens a folder of records or "tfds:NAME"."""
        if path.startswith(TFDS):
            self._builder, self._split = open_builder(path.removeprefix(TFDS))
        else:
            self._builder, self._split = _open_folder(path), _SPLIT
        super().__init__([_SPLIT])

    def list_shards(self, split: str) -> list[str]:
        """All files."""
        return self._builder.info.splits[self._split].filenames

    def get_dataset(
        self, split=_SPLIT, shuffle=True, seed=None, shard_info=None, **_
    ) -> tf.data.Dataset:
        """Rows as they are stored; shard i of n has the files i::n."""
        shard = shard_info or seqio.ShardInfo(0, 1)
        return self._builder.as_dataset(
            split=self._split,
            shuffle_files=shuffle,
            decoders={key: tfds.decode.SkipDecoding() for key in ("image", "text")},
            read_config=tfds.ReadConfig(
                shuffle_seed=seed,
                interleave_cycle_length=max(1, _OPEN_FILES // shard.num_shards),
                interleave_block_length=1,
                num_parallel_calls_for_decode=1,
                skip_prefetch=True,
                try_autocache=False,
                input_context=tf.distribute.InputContext(shard.num_shards, shard.index),
            ),
        )
