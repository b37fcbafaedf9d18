"""Captioned images to prepare: what a source is, and what all kinds of it share."""

import collections
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.files import split_lines
from imagen_jax.images import png
from imagen_jax.preparing import images
from imagen_jax.preparing.settings import Settings
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes import wordings

# Columns of captions: those of img2dataset and Hugging Face, then what others use.
CAPTIONS = ("caption", "text", "TEXT", "captions", "txt", "prompt")
# Images that are decoded ahead of the one whose turn it is.
_READ_AHEAD = 64
# {FIRST..LAST} and {A,B} in the names of files, and for how many names they may stand.
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST_NAMES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Example:
    """One image and its caption."""

    id: int  # unique in the source
    name: str  # for messages
    caption: str  # stripped; empty for the null text only
    read: Callable[[], bytes]  # the image's file
    parts: int = 1  # files, members or rows of the source that it is made of
    # Numbers by name, NaN for what is not known; set when its image is stored.
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """Something in a source that cannot be used: its name, and the reason."""

    name: str
    reason: str
    # Files, members or rows of the source that are lost with it.
    parts: int = dataclasses.field(default=1, compare=False)


@dataclasses.dataclass(frozen=True)
class Rest:
    """What a source or a shard holds beside its examples and problems."""

    holds: int  # files, members or rows, those of examples and problems too
    # Those of no example and no problem, by kind; "used" are tables of captions.
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Source:
    """Captioned images, in shards that any process can read and finds the same."""

    shards: int  # number of shards
    # A shard, given its number; with the rest, where only its reader can tell.
    read: Callable[[int], Iterable[Example | Problem | Rest]]
    count: int | None  # examples in all shards; None if unknown
    sha256: str  # changes when names, captions or lengths of files do
    times: Sequence[float] = ()  # when its files were last changed
    rest: Rest = Rest(0)
    problems: Sequence[Problem] = ()  # those that belong to no shard
    takes: str = ""  # what can be used, for messages


def numbered(
    count: int,
    settings: Settings,
    read: Callable[[range], Iterable[Example | Problem]],
    sha256: str,
    rest: Rest | None = None,
    **more: Any,
) -> Source:
    """A source of `count` examples, of which `read` yields those of a range."""
    size, rest = settings.shard_examples, rest or Rest(count)

    def read_shard(number: int) -> Iterable[Example | Problem]:
        return read(range(count)[number * size : (number + 1) * size])

    return Source(-(-count // size), read_shard, count, sha256, rest=rest, **more)


def open_drawn(argument: str, settings: Settings) -> Source:
    """The drawn scenes of "shapes:N", or "wordings:N" with captions in other words."""
    if not argument.isdecimal() or int(argument) < 1:
        raise UserError(f"--source is {settings.source!r}; give a number above zero")
    count = int(argument)
    if settings.source.startswith("wordings:"):
        examples = list(wordings.generate(count, settings.seed))
        told = map(repr, examples)
    else:
        scenes = list(shapes.generate(count, settings.seed))
        examples = [(scene, shapes.caption(scene)) for scene in scenes]
        told = map(repr, scenes)  # captions follow from these

    def draw(i: int) -> bytes:
        return png(shapes.draw(examples[i][0], settings.image_size))

    def read(rows: range) -> Iterator[Example]:
        for i in rows:
            yield Example(i, f"scene {i}", examples[i][1], functools.partial(draw, i))

    return numbered(count, settings, read, sha256_of(told))


def matching_files(pattern: str, what: str, inside: str) -> list[str]:
    """The files that match a glob with braces, sorted; in a folder, those of `inside`.

    `UserError` if none matches, or none what the braces stand for.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", inside)
    elif os.path.exists(pattern):
        return [pattern]
    files = set()
    for own in expand_braces(pattern):
        found = glob.glob(own, recursive=True)
        if not found:
            raise UserError(f"no {what} matches {own!r} (quote it for your shell)")
        files.update(found)
    return sorted(files)


def expand_braces(pattern: str) -> list[str]:
    """What {FIRST..LAST} and {A,B} in a pattern stand for, as in a shell; sorted.

    Numbers are filled up with zeros if an end of their range is.
    """
    done, todo = set(), [pattern]
    while todo:
        own = todo.pop()
        if not (match := _BRACES.search(own)):
            done.add(own)
            continue
        *ends, words = match.groups()
        if words is None:
            first, last = sorted(map(int, ends))
            digits = max(map(len, ends)) if any(e[0] == "0" for e in ends) else 1
            inner = (f"{n:0{digits}}" for n in range(first, last + 1))
        else:
            inner = words.split(",")
        for word in inner:
            todo.append(own[: match.start()] + word + own[match.end() :])
            if len(todo) + len(done) > _MOST_NAMES:
                raise UserError(f"{pattern!r} stands for over {_MOST_NAMES:,} files")
    return sorted(done)


def sha256_of(rows: Iterable) -> str:
    """A hash of JSON values."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def caption_in(row: Any, settings: Settings, usual: Sequence[str] = CAPTIONS) -> Any:
    """What a row, or an object of JSON, has in the first of the columns of captions."""
    if not isinstance(row, dict):
        return None
    columns = [settings.caption_column] if settings.caption_column else usual
    return next((row[name] for name in columns if row.get(name) is not None), None)


def first_lines(text: bytes, settings: Settings) -> bytes:
    """What of a text file is the caption."""
    count = settings.caption_lines
    return b"\n".join(split_lines(text)[:count]) if count else text


def make_example(
    settings: Settings,
    id: int,
    name: str,
    caption: Any,
    read: Callable[[], bytes],
    parts: int = 1,
) -> Example | Problem:
    """The example, or the problem with its caption.

    `caption` is text, bytes of UTF-8, or a list, of which number `id % length` counts.
    """
    if settings.no_captions:
        return Example(id, name, "", read, parts)
    if isinstance(caption, list):
        captions = [own for own in caption if own is not None]
        caption = captions[id % len(captions)] if captions else None
    caption = "" if caption is None else caption
    if not isinstance(caption, str | bytes):
        return Problem(name, "the caption is no text", parts)
    try:
        # A byte order mark is no text.
        text = caption if isinstance(caption, str) else caption.decode("utf-8-sig")
        text.encode()  # JSON can hold halves of characters
    except UnicodeError:
        return Problem(name, "the caption is not UTF-8 text", parts)
    if not text.strip():
        return Problem(name, "the caption is empty", parts)
    return Example(id, name, text.strip(), read, parts)


def verify_images(
    items: Iterable[Example | Problem | Rest], **rules: Any
) -> Iterator[tuple[Example, images.StoredImage] | Problem | Rest]:
    """Decodes the images of `items` by `images.verify`, several at a time, in order."""

    def verified(item):
        if not isinstance(item, Example):
            return item
        try:
            return item, images.verify(item.read(), **rules)
        except images.Unusable as error:
            return Problem(item.name, str(error), item.parts)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            return Problem(item.name, reason, item.parts)

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
