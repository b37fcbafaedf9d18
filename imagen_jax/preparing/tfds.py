"""Captioned pictures of TensorFlow Datasets."""

from collections.abc import Iterator

import tensorflow_datasets as tfds

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources as originals
from imagen_jax.preparing.folder import decode_caption

_SPLIT = "train"
_CAPTIONS = ("captions", "caption", "text")


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
