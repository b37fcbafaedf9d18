"""TensorFlow Datasets: captioned images from one, and records as one."""

import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from imagen_jax.data.manifest import Manifest
from imagen_jax.data.tfds import open_builder
from imagen_jax.errors import UserError
from imagen_jax.preparing import sources as originals
from imagen_jax.preparing.folder import decode_caption
from imagen_jax.text import embeddings

_CAPTIONS = ("captions", "caption", "text")


def open_tfds(name: str, size: int) -> originals.Originals:
    """The pictures of a data set of tfds.

    Pictures are taken as they are stored, not decoded. Of several captions one is
    taken (`originals.choose`).

    Args:
      name: of `open_builder`.
      size: examples in a shard.

    Raises:
      UserError: for an unknown or unprepared data set or split, and one without
        pictures and captions.
    """
    builder, split = open_builder(name)
    caption = _caption_feature(builder)
    count = builder.info.splits[split].num_examples

    def read(shard: int) -> Iterator[originals.Example | originals.Problem]:
        start, stop = shard * size, min((shard + 1) * size, count)
        rows = builder.as_dataset(
            split=f"{split}[{start}:{stop}]",
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
            # Files one after the other, so that an example's number is its own.
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        for id, row in zip(range(start, stop), rows.as_numpy_iterator()):
            yield _example(f"{split}[{id}]", row["image"], row[caption], id)

    sha256 = originals.sha256_of([builder.info.full_name, split, count])
    return originals.Originals(-(-count // size), read, count, [], sha256)


def _caption_feature(builder) -> str:
    features = builder.info.features
    known = isinstance(features, tfds.features.FeaturesDict) and "image" in features
    if not known or not isinstance(features["image"], tfds.features.Image):
        raise UserError(f"{builder.name!r} of tfds has no pictures named 'image'")
    for name in _CAPTIONS:
        if name in features:
            return name
    raise UserError(
        f"{builder.name!r} of tfds has none of the features {', '.join(_CAPTIONS)}"
    )


def _example(name, image, captions, id) -> originals.Example | originals.Problem:
    # coco_captions: a sequence of {"id", "text"}.
    captions = captions["text"] if isinstance(captions, dict) else captions
    if not isinstance(captions, bytes):
        captions = originals.choose([bytes(c) for c in captions], id) or b""
    caption = decode_caption(captions)
    if caption is None:
        return originals.Problem(name, originals.NOT_UTF8)
    if not caption:
        return originals.Problem(name, originals.EMPTY_CAPTION)
    return originals.Example(id, name, caption, lambda: image)


def info_files(done: Manifest, examples: Sequence[int]) -> dict[str, str]:
    """The files beside records with which `tfds.builder_from_directory` reads them.

    Args:
      done: the manifest.
      examples: number of examples in each file, empty files included.

    Returns:
      text by file name.
    """
    int8 = done.embedding_dtype == "int8"
    features = tfds.features.FeaturesDict(
        {
            "id": np.int64,
            "image": tfds.features.Image(),
            "caption": tfds.features.Text(),
            "text": tfds.features.Tensor(
                shape=(None, embeddings.row_bytes(done.text_dim, "int8"))
                if int8
                else (None, done.text_dim),
                dtype=tf.uint8 if int8 else tf.bfloat16,
                encoding="bytes",
            ),
            "side": np.int64,
        }
    )
    sides = [int(side) for shard in done.shards for side in shard["sides"]]
    name = "imagen_records"
    with tempfile.TemporaryDirectory() as temporary:
        info = tfds.core.DatasetInfo(
            builder=tfds.core.dataset_info.DatasetIdentity(
                name=name,
                version=tfds.core.Version("1.0.0"),
                data_dir=temporary,
                module_name="",
            ),
            description="Captioned pictures with the embeddings of a frozen text "
            "encoder.",
            features=features,
            metadata=tfds.core.MetadataDict(encoder=done.encoder, min_side=min(sides)),
        )
        info.set_file_format("tfrecord")
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=list(examples),
            num_bytes=done.image_bytes + done.text_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=temporary,
                dataset_name=name,
                filetype_suffix="tfrecord",
                template="records-{SHARD_INDEX}.{FILEFORMAT}",
            ),
        )
        info.set_splits(tfds.core.splits.SplitDict([split]))
        info.write_to_directory(temporary)
        files = sorted(pathlib.Path(temporary).iterdir())
        return {file.name: file.read_text("utf8") for file in files}
