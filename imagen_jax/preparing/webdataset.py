"""Tars of captioned images, as img2dataset and webdataset write them.

KEY.jpg, KEY.png or KEY.webp stands next to KEY.txt, KEY.caption, or KEY.json with a
"caption". The members of a key follow each other.
"""

import collections
import functools
import io
import json
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.preparing import names, sources
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Example, Problem, Rest, Source

# Of several beside an image the first one is read.
_TEXTS = (".txt", ".caption", ".json")
# Members of one key are few. As many are held that differ behind a later dot.
_MOST_HELD = 64
# What tarfile and the decompressors raise on damaged files. A file that cannot be read
# is an OSError as well, but one with a number.
_CUT = (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
_TAKES = (
    f"taken are KEY{', KEY'.join(names.IMAGES)} with KEY{' or KEY'.join(_TEXTS)} next "
    "to it (a key of the .json: caption, text or --caption_column); or pictures alone, "
    "with --no_captions"
)


class _TarInfo(tarfile.TarInfo):
    """Notes whether a tar ends as tars do; tarfile takes a cut header for an end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.is_whole = True
            raise


def open_tars(pattern: str, settings: Settings) -> Source:
    """The examples of the tars that match `pattern`; each tar is a shard."""
    files = sources.matching_files(pattern, "tar", "*.tar")

    def read(shard: int) -> Iterator[Example | Problem | Rest]:
        # Interleaved ids: how many examples the other tars have is not known.
        return _read_tar(settings, files[shard], iter(range(shard, 2**63, len(files))))

    stats = [os.stat(file) for file in files]
    sizes = ((os.path.basename(f), s.st_size) for f, s in zip(files, stats))
    times = [stat.st_mtime_ns for stat in stats]
    return Source(len(files), read, None, sources.sha256_of(sizes), times, takes=_TAKES)


def _read_tar(
    settings: Settings, file: str, ids: Iterator[int]
) -> Iterator[Example | Problem | Rest]:
    tar_name, rest = os.path.basename(file), collections.Counter()
    group, holds, count, is_whole = [], 0, 0, False
    reason = "it does not end as a tar does: cut or damaged"
    try:
        with tarfile.open(file, "r|*", tarinfo=_TarInfo) as tar:
            for member in tar:
                if kind := _passed_over(settings, member):
                    rest[kind] += 1
                elif not member.isfile():
                    why = "is a link, or no file: pack the file itself (tar -h --hard-"
                    yield Problem(f"{tar_name}/{member.name}", f"{why}dereference)")
                else:
                    if group and _ends_before(group, member.name):
                        for item in _items(settings, tar_name, group, ids, rest):
                            count += isinstance(item, Example)
                            yield item
                        group = []
                    group.append((member.name, tar.extractfile(member).read()))
                holds += 1
            is_whole = getattr(tar, "is_whole", False)
    except _CUT as error:
        if getattr(error, "errno", None):
            raise UserError(f"{file!r} cannot be read: {error.strerror}") from None
        reason = f"{type(error).__name__}: {error}"
    lost = 0
    for item in _items(settings, tar_name, group, ids, rest):
        # The last members before a cut may lack their image or their caption.
        if isinstance(item, Problem) and not is_whole:
            lost += item.parts
        else:
            count += isinstance(item, Example)
            yield item
    if not is_whole:
        yield Problem(tar_name, f"{reason}; after {count} examples", lost)
    yield Rest(holds, rest)


def _passed_over(settings: Settings, member: tarfile.TarInfo) -> str:
    """As what a member is counted that is neither an image nor a text."""
    if names.is_hidden(member.name):
        return names.HIDDEN
    if member.isdir():
        return names.FOLDERS
    is_wanted = names.ending(member.name) in names.IMAGES + _texts(settings)
    return "" if is_wanted else names.kind_of(member.name)


def _texts(settings: Settings) -> tuple[str, ...]:
    if settings.no_captions:
        return ()
    return (".json",) if settings.caption_column else _TEXTS


def _ends_before(group: list[tuple[str, bytes]], name: str) -> bool:
    """Whether a member is of another key, or begins a key once more."""
    first, last = group[0][0], group[-1][0]
    is_full = len(group) >= _MOST_HELD and _stem(name) != _stem(last)
    return name == first or is_full or _key(name) != _key(first)


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    folder, last = posixpath.split(name)
    return posixpath.join(folder, last.partition(".")[0])


def _items(
    settings: Settings,
    tar: str,
    group: list[tuple[str, bytes]],
    ids: Iterator[int],
    rest: collections.Counter,
) -> Iterator[Example | Problem]:
    """What images and texts of one key are; others are counted in `rest`."""
    files, counts = dict(group), collections.Counter(name for name, _ in group)
    if twice := [name for name in files if counts[name] > 1]:
        reason = f"{twice[0]} is there twice: which belong together?"
        for name, _ in group:
            yield Problem(f"{tar}/{name}", reason)
        return
    pairs, problems, others = names.sort_out(files, _texts(settings))
    rest.update(others)
    same = collections.Counter(_stem(image) for image, _, _ in pairs)
    for image, text, parts in pairs:
        name = f"{tar}/{_stem(image) if same[_stem(image)] == 1 else image}"
        caption = _caption(settings, text, files[text]) if text else None
        read = functools.partial(files.get, image)
        yield sources.make_example(settings, next(ids), name, caption, read, parts)
    for problem in problems:
        name = f"{tar}/{_stem(problem.name)}"
        yield Problem(name, problem.reason, problem.parts)


def _caption(settings: Settings, name: str, data: bytes) -> Any:
    if names.ending(name) != ".json":
        return sources.first_lines(data, settings)
    try:
        return sources.caption_in(json.loads(data), settings)
    except UnicodeDecodeError:
        return data  # `make_example` says that it is not UTF-8
    except (ValueError, RecursionError):
        return None


def write_tar(path: os.PathLike, rows: Iterable[tuple]) -> None:
    """Writes rows (`Example`, `StoredImage`, ...) as a tar that `open_tars` reads."""
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for example, image, *_ in rows:
            kind = "png" if image.data.startswith(b"\x89PNG") else "jpg"
            values = {"caption": example.caption, "name": example.name}
            text = json.dumps(values, ensure_ascii=False)
            # As JSON escapes them: bytes of a name that are not UTF-8.
            text = text.encode("utf8", "backslashreplace")
            for extension, data in ((kind, image.data), ("json", text)):
                # A new TarInfo has no owner and no time.
                info = tarfile.TarInfo(f"{example.id:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
