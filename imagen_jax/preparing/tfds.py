"""TensorFlow Datasets: captioned images from one, and records as one."""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from imagen_jax.data.manifest import Manifest
from imagen_jax.data.tfds import open_builder
from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Example, Problem, Source
from imagen_jax.text import embeddings

_CAPTIONS = ("captions", "caption", "text")


def open_tfds(name: str, settings: Settings) -> Source:
    """The images of a data set of tfds, as they are stored."""
    builder, split = open_builder(name)
    features = dict(builder.info.features.items())
    captions = [feature for feature in _CAPTIONS if feature in features]
    if not (captions or settings.no_captions) or "image" not in features:
        needed = f"image and one of {', '.join(_CAPTIONS)}"
        raise UserError(f"tfds:{name} needs {needed}, but has {', '.join(features)}")
    count = builder.info.splits[split].num_examples

    def read(rows: range) -> Iterator[Example | Problem]:
        data = builder.as_dataset(
            split=f"{split}[{rows.start}:{rows.stop}]",
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
            # One file after the other, so that ids do not depend on the shards.
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        id = rows.start - 1
        for id, row in zip(rows, data.as_numpy_iterator()):
            text = None if settings.no_captions else row[captions[0]]
            # coco_captions: a sequence of {"id", "text"}.
            text = text["text"] if isinstance(text, dict) else text
            text = list(text) if isinstance(text, np.ndarray) else text
            read_image = functools.partial(row.get, "image")
            place = f"{split}[{id}]"
            yield sources.make_example(settings, id, place, text, read_image)
        if id + 1 < rows.stop:
            reason = "the data set ends before it"
            yield Problem(f"{split}[{id + 1}]", reason, rows.stop - id - 1)

    sha256 = sources.sha256_of([builder.info.full_name, split, count])
    files = sorted(epath.Path(builder.data_dir).iterdir())
    times = [file.stat().mtime for file in files]
    return sources.numbered(count, settings, read, sha256, times=times)


def write_info(folder: pathlib.Path, manifest: Manifest, examples: list[int]) -> None:
    """Writes what `tfds.builder_from_directory` reads; `examples`: per file."""
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
    if manifest.scores:
        features["scores"] = dict.fromkeys(manifest.scores, np.float32)
    name, version = "imagen_records", tfds.core.Version("1.0.0")
    sides = [int(side) for shard in manifest.shards for side in shard["sides"]]
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(name, version, str(folder), ""),
        description="Captioned pictures with the embeddings of a frozen text encoder.",
        features=tfds.features.FeaturesDict(features),
        metadata=tfds.core.MetadataDict(encoder=manifest.encoder, min_side=min(sides)),
    )
    info.set_file_format("tfrecord")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=name,
        filetype_suffix="tfrecord",
        template="records-{SHARD_INDEX}.{FILEFORMAT}",
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=examples,
        num_bytes=manifest.image_bytes + manifest.text_bytes,
        filename_template=template,
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)
