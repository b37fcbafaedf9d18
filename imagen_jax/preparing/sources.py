"""The captioned pictures that `prepare` starts from.

A source is divided into shards that depend on the source and the settings alone: any
process can read any shard, and finds the same examples in it.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.preparing import folder
from imagen_jax.preparing.images import encode_png
from imagen_jax.shapes import scenes as shapes

FORMS = "folder:DIR, webdataset:GLOB, parquet:GLOB, tfds:NAME or shapes:N"
EMPTY_CAPTION = "the caption is empty"
NOT_UTF8 = "the caption is not UTF-8 text"


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture and its caption.

    Attributes:
      id: its number, unique in the source.
      name: what messages call it.
      caption: not empty.
      read: returns the picture's file.
    """

    id: int
    name: str
    caption: str
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something of a source that cannot be used: its name, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Originals:
    """A source.

    Attributes:
      shards: into how many parts it is divided.
      read: yields what is in a shard, given its number, in order.
      count: examples of all shards; None if nothing is known of it.
      problems: what cannot be used and belongs to no shard.
      sha256: changes when names, captions or lengths of files do.
      exact: whether `count` is; else it is an estimate.
    """

    shards: int
    read: Callable[[int], Iterator[Example | Problem]]
    count: int | None
    problems: list[Problem]
    sha256: str
    exact: bool = True


def open_originals(
    source: str, image_size: int, seed: int, shard_examples: int
) -> Originals:
    """The examples of `source`; no picture is opened yet.

    Args:
      source: one of `FORMS`.
      image_size: pixels of a side of drawn scenes.
      seed: of a folder's order, and of the drawn scenes.
      shard_examples: examples in a shard, where the source does not decide it: a tar
        is a shard.

    Raises:
      UserError: when there is no such source, or it is not as it must be.
    """
    kind, _, argument = source.partition(":")
    kinds = {
        "folder": functools.partial(_open_folder, seed=seed, size=shard_examples),
        "shapes": functools.partial(
            _open_shapes, image_size=image_size, seed=seed, size=shard_examples
        ),
        "webdataset": _open_webdataset,
        "parquet": functools.partial(_open_parquet, size=shard_examples),
        "tfds": functools.partial(_open_tfds, size=shard_examples),
    }
    if kind not in kinds or not argument:
        raise UserError(
            f"--source is {source!r}{did_you_mean(kind, kinds)}; it is {FORMS}"
        )
    return kinds[kind](argument)


def files_of(pattern: str, what: str) -> list[str]:
    """The files that match `pattern`, sorted.

    Raises:
      UserError: when there are none; `what` says what is looked for.
    """
    files = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not files:
        raise UserError(f"no {what} matches {pattern!r} (quote it for your shell)")
    return files


def sha256_of_files(files: Iterable[str]) -> str:
    """Of the names and lengths of files, not of where they lie."""
    return sha256_of((os.path.basename(f), os.path.getsize(f)) for f in files)


def sha256_of(rows: Iterable) -> str:
    """Of values that JSON knows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def choose(captions: list, number: int):
    """The one caption that a picture with several is stored with.

    The n-th picture takes its (n modulo their number)-th: all places of the list are
    taken equally often.
    """
    return captions[number % len(captions)] if captions else ""


def _open_folder(argument: str, seed: int, size: int) -> Originals:
    listing = folder.list_folder(argument)
    root = pathlib.Path(argument)
    count = len(listing.pairs)
    # Neighbours in a folder are alike; a shuffle buffer in training may be too small
    # to part them.
    order = np.random.default_rng(seed).permutation(count)

    def read(shard: int) -> Iterator[Example]:
        for i in order[shard * size : (shard + 1) * size].tolist():
            name, caption = listing.pairs[i]
            yield Example(i, name, caption, (root / name).read_bytes)

    problems = [Problem(name, reason) for name, reason in listing.problems]
    sizes = ((*pair, os.path.getsize(root / pair[0])) for pair in listing.pairs)
    return Originals(-(-count // size), read, count, problems, sha256_of(sizes))


def _open_shapes(argument: str, image_size: int, seed: int, size: int) -> Originals:
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

    return Originals(
        -(-count // size), read, count, [], sha256_of(repr(s) for s in scenes)
    )


def _open_webdataset(pattern: str) -> Originals:
    from imagen_jax.preparing import webdataset

    return webdataset.open_tars(pattern)


def _open_parquet(pattern: str, size: int) -> Originals:
    from imagen_jax.preparing import parquet

    return parquet.open_parquet(pattern, size)


def _open_tfds(name: str, size: int) -> Originals:
    from imagen_jax.data.start_tensorflow import start_tensorflow

    start_tensorflow()
    from imagen_jax.preparing import tfds as tfds_source

    return tfds_source.open_tfds(name, size)
