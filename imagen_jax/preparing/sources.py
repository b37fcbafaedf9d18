"""Captioned images to prepare: what a source is, and how one is opened by its name.

A source is divided into shards that depend on the source and the settings alone: any
process can read any shard, and finds the same examples in it.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator

from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.preparing.images import (
    Rules,
    StoredImage,
    Unusable,
    encode_png,
    verify,
)

KINDS = ("folder", "webdataset", "parquet", "tfds", "shapes")
FORMS = "folder:DIR, webdataset:GLOB, parquet:GLOB, tfds:NAME or shapes:N"
NOT_UTF8 = "the caption is not UTF-8 text"
# Images that are decoded ahead of the one whose turn it is.
_READ_AHEAD = 64


@dataclasses.dataclass(frozen=True)
class Example:
    """One image and its caption.

    Attributes:
      id: its number, unique in the source.
      name: what messages call it.
      caption: text, not empty.
      read: returns the bytes of the image's file.
    """

    id: int
    name: str
    caption: str
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """Something in a source that cannot be used: its name, and the reason."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Verified:
    """An example whose image is known to decode, as it will be stored."""

    id: int
    name: str
    caption: str
    image: StoredImage


@dataclasses.dataclass(frozen=True)
class Source:
    """Captioned images, divided into shards.

    Attributes:
      shards: number of shards.
      read: yields the examples and problems of a shard, given its number, in order.
      count: examples in all shards; None if unknown.
      problems: what cannot be used and belongs to no shard.
      sha256: changes when names, captions or lengths of files do.
      exact: whether `count` is exact or an estimate.
    """

    shards: int
    read: Callable[[int], Iterator[Example | Problem]]
    count: int | None
    problems: list[Problem]
    sha256: str
    exact: bool = True


def open_source(name: str, image_size: int, seed: int, shard_examples: int) -> Source:
    """Opens the source called `name`, without opening an image.

    Args:
      name: one of `FORMS`.
      image_size: pixels of a side of drawn scenes.
      seed: seed of the order of a folder and of drawn scenes.
      shard_examples: examples in a shard; not for tars, each of which is a shard.

    Raises:
      UserError: when there is no such source, or it is malformed.
    """
    kind, _, argument = name.partition(":")
    if kind not in KINDS or not argument:
        raise UserError(
            f"--source is {name!r}{did_you_mean(kind, KINDS)}; it is {FORMS}"
        )
    if kind == "folder":
        from imagen_jax.preparing.folder import open_folder

        return open_folder(argument, seed, shard_examples)
    if kind == "webdataset":
        from imagen_jax.preparing.webdataset import open_tars

        return open_tars(argument)
    if kind == "parquet":
        from imagen_jax.preparing.parquet import open_parquet

        return open_parquet(argument, shard_examples)
    if kind == "tfds":
        from imagen_jax.data.start_tensorflow import start_tensorflow

        start_tensorflow()
        from imagen_jax.preparing.tfds import open_tfds

        return open_tfds(argument, shard_examples)
    return _open_shapes(argument, image_size, seed, shard_examples)


def _open_shapes(argument: str, image_size: int, seed: int, size: int) -> Source:
    from imagen_jax.shapes import scenes as shapes

    if not argument.isdecimal() or int(argument) < 1:
        raise UserError(f"--source is 'shapes:{argument}'; give a number above zero")
    count = int(argument)
    scenes = list(shapes.generate(count, seed))

    def read(shard: int) -> Iterator[Example]:
        for i in range(shard * size, min((shard + 1) * size, count)):
            yield Example(
                i,
                f"scene {i}",
                shapes.caption(scenes[i]),
                lambda i=i: encode_png(shapes.draw(scenes[i], image_size)),
            )

    return Source(-(-count // size), read, count, [], sha256_of(map(repr, scenes)))


def matching_files(pattern: str, what: str) -> list[str]:
    """The files that match a glob, sorted.

    Raises:
      UserError: when there are none; `what` names the kind of file.
    """
    files = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not files:
        raise UserError(f"no {what} matches {pattern!r} (quote it for your shell)")
    return files


def sha256_of(rows: Iterable) -> str:
    """A hash of JSON values."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def choose_caption(captions: list, id: int):
    """The caption that is stored for an image with several: number `id` modulo n.

    All positions of the list are chosen equally often.
    """
    return captions[id % len(captions)] if captions else ""


def caption_text(caption: str | bytes) -> str:
    """A caption without the space around it; bytes are UTF-8, with or without a BOM.

    Raises:
      Unusable: when it is empty or not UTF-8.
    """
    try:
        text = caption if isinstance(caption, str) else caption.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unusable(NOT_UTF8) from None
    if not text.strip():
        raise Unusable("the caption is empty")
    return text.strip()


def make_example(
    id: int, name: str, caption: str | bytes, read: Callable[[], bytes]
) -> Example | Problem:
    """The example, or the problem with its caption."""
    try:
        return Example(id, name, caption_text(caption), read)
    except Unusable as error:
        return Problem(name, str(error))


def verify_images(
    items: Iterable[Example | Problem], rules: Rules
) -> Iterator[Verified | Problem]:
    """Decodes the images of `items`, several at a time; yields in their order."""

    def verified(item):
        if isinstance(item, Problem):
            return item
        try:
            image = verify(item.read(), rules)
        except Unusable as error:
            return Problem(item.name, str(error))
        except OSError as error:
            return Problem(item.name, f"cannot be read: {error.strerror or error}")
        return Verified(item.id, item.name, item.caption, image)

    # Executor.map would read all items ahead.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(verified, item))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
