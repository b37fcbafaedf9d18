"""TensorFlow Datasets: captioned images from one, and records as one."""

import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from imagen_jax.data.manifest import Manifest
from imagen_jax.data.tfds_records import open_builder
from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.sources import Example, Problem, Source
from imagen_jax.text import embeddings

_CAPTIONS = ("captions", "caption", "text")


def open_tfds(name: str, size: int) -> Source:
    """The images of a data set of tfds, as they are stored; `size` make a shard.

    Of several captions one is taken (`sources.choose_caption`).

    Raises:
      UserError: for an unknown or unprepared data set or split (`open_builder`), and
        one without images and captions.
    """
    builder, split = open_builder(name)
    features = dict(builder.info.features.items())
    captions = [feature for feature in _CAPTIONS if feature in features]
    if not (captions and isinstance(features.get("image"), tfds.features.Image)):
        raise UserError(
            f"{name!r} of tfds has not both a feature 'image' and one of "
            f"{', '.join(_CAPTIONS)}; it has {', '.join(features)}"
        )
    count = builder.info.splits[split].num_examples

    def read(shard: int) -> Iterator[Example | Problem]:
        start, stop = shard * size, min((shard + 1) * size, count)
        rows = builder.as_dataset(
            split=f"{split}[{start}:{stop}]",
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
            # One file after the other, so that ids do not depend on the shards.
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        for id, row in zip(range(start, stop), rows.as_numpy_iterator()):
            yield _example(id, f"{split}[{id}]", row["image"], row[captions[0]])

    sha256 = sources.sha256_of([builder.info.full_name, split, count])
    return Source(-(-count // size), read, count, [], sha256)


def _example(id: int, name: str, image: bytes, captions) -> Example | Problem:
    # coco_captions: a sequence of {"id", "text"}.
    captions = captions["text"] if isinstance(captions, dict) else captions
    if not isinstance(captions, bytes):
        captions = sources.choose_caption([bytes(c) for c in captions], id)
    return sources.make_example(id, name, captions, lambda: image)


def info_files(manifest: Manifest, examples: list[int]) -> dict[str, str]:
    """The files with which `tfds.builder_from_directory` reads a folder of records.

    Args:
      manifest: the manifest of the records.
      examples: number of examples in each file, those without any included.

    Returns:
      text by file name.
    """
    width, dtype = manifest.text_dim, tf.bfloat16
    if manifest.embedding_dtype == "int8":
        width, dtype = embeddings.row_bytes(width, "int8"), tf.uint8
    text = tfds.features.Tensor(shape=(None, width), dtype=dtype, encoding="bytes")
    features = {
        "id": np.int64,
        "image": tfds.features.Image(),
        "caption": tfds.features.Text(),
        "text": text,
        "side": np.int64,
    }
    sides = [int(side) for shard in manifest.shards for side in shard["sides"]]
    metadata = tfds.core.MetadataDict(encoder=manifest.encoder, min_side=min(sides))
    with tempfile.TemporaryDirectory() as folder:
        info = tfds.core.DatasetInfo(
            builder=tfds.core.dataset_info.DatasetIdentity(
                name="imagen_records",
                version=tfds.core.Version("1.0.0"),
                data_dir=folder,
                module_name="",
            ),
            description=(
                "Captioned pictures with the embeddings of a frozen text encoder."
            ),
            features=tfds.features.FeaturesDict(features),
            metadata=metadata,
        )
        info.set_file_format("tfrecord")
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=examples,
            num_bytes=manifest.image_bytes + manifest.text_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder,
                dataset_name=info.name,
                filetype_suffix="tfrecord",
                template="records-{SHARD_INDEX}.{FILEFORMAT}",
            ),
        )
        info.set_splits(tfds.core.splits.SplitDict([split]))
        info.write_to_directory(folder)
        files = sorted(pathlib.Path(folder).iterdir())
        return {file.name: file.read_text("utf8") for file in files}
