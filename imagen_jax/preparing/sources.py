"""Captioned images to prepare: what a source is, and what all kinds of it share."""

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.preparing import images
from imagen_jax.shapes import scenes as shapes

FORMS = "folder:DIR, webdataset:GLOB, parquet:GLOB, tfds:NAME or shapes:N"
# Images that are decoded ahead of the one whose turn it is.
_READ_AHEAD = 64


@dataclasses.dataclass(frozen=True)
class Example:
    """One image and its caption."""

    id: int  # unique in the source
    name: str  # for messages
    caption: str  # stripped, not empty
    read: Callable[[], bytes]  # the image's file


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """Something in a source that cannot be used: its name, and the reason."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Captioned images, in shards that any process can read and finds the same."""

    shards: int  # number of shards
    read: Callable[[int], Iterator[Example | Problem]]  # a shard, given its number
    count: int | None  # examples in all shards; None if unknown
    problems: list[Problem]  # those that belong to no shard
    sha256: str  # changes when names, captions or lengths of files do
    times: Sequence[float] = ()  # when its files were last changed


def open_shapes(argument: str, image_size: int, seed: int, size: int) -> Source:
    """The drawn scenes of "shapes:N"; `size` make a shard."""
    if not argument.isdecimal() or int(argument) < 1:
        raise UserError(f"--source is 'shapes:{argument}'; give a number above zero")
    count = int(argument)
    scenes = list(shapes.generate(count, seed))

    def draw(i: int) -> bytes:
        return images.encode_png(shapes.draw(scenes[i], image_size))

    def read(shard: int) -> Iterator[Example]:
        for i in range(count)[shard * size : (shard + 1) * size]:
            caption = shapes.caption(scenes[i])
            yield Example(i, f"scene {i}", caption, lambda i=i: draw(i))

    return Source(-(-count // size), read, count, [], sha256_of(map(repr, scenes)))


def matching_files(pattern: str, what: str) -> list[str]:
    """The files that match a glob, sorted; `UserError` if none does."""
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


def make_example(
    id: int, name: str, caption: str | bytes, read: Callable[[], bytes]
) -> Example | Problem:
    """The example, or the problem with its caption."""
    try:
        # A byte order mark is no text.
        text = caption if isinstance(caption, str) else caption.decode("utf-8-sig")
        text.encode()  # JSON can hold halves of characters
    except UnicodeError:
        return Problem(name, "the caption is not UTF-8 text")
    if not text.strip():
        return Problem(name, "the caption is empty")
    return Example(id, name, text.strip(), read)


def verify_images(
    items: Iterable[Example | Problem], **rules: Any
) -> Iterator[tuple[Example, images.StoredImage] | Problem]:
    """Decodes the images of `items` by `images.verify`, several at a time, in order."""

    def verified(item):
        if isinstance(item, Problem):
            return item
        try:
            return item, images.verify(item.read(), **rules)
        except images.Unusable as error:
            return Problem(item.name, str(error))
        except OSError as error:
            return Problem(item.name, f"cannot be read: {error.strerror or error}")

    images.give_memory_back()
    # Executor.map would read all items ahead.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(verified, item))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
