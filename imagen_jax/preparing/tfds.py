"""Captioned images of TensorFlow Datasets."""

from collections.abc import Iterator

from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.sources import Example, Problem, Source

_CAPTIONS = ("captions", "caption", "text")


def open_tfds(name: str, size: int) -> Source:
    """The images of a data set of tfds, as they are stored; `size` make a shard.

    Of several captions one is taken (`sources.choose_caption`).

    Raises:
      UserError: for an unknown or unprepared data set or split (`open_builder`), and
        one without images and captions.
    """
    start_tensorflow()
    import tensorflow_datasets as tfds

    from imagen_jax.data.tfds_records import open_builder

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
