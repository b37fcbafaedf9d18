"""Tars of captioned images, as img2dataset and webdataset write them.

KEY.jpg, KEY.png or KEY.webp stands beside KEY.txt, or beside KEY.json with a
"caption"; the key is the path up to the first dot of its last part.
"""

import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources
from imagen_jax.preparing.sources import Example, Problem, Source

_IMAGES = {"bmp", "gif", "jpeg", "jpg", "png", "webp"}
_TEXTS = {"txt", "json"}
# What tarfile and the decompressors raise on damaged files. A file that cannot be read
# is an OSError as well, but one with a number.
_CUT = (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)


class _TarInfo(tarfile.TarInfo):
    """Notes whether a tar ends as tars do; tarfile takes a cut header for an end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.is_whole = True
            raise


def open_tars(pattern: str) -> Source:
    """The examples of the tars that match `pattern`; each tar is a shard."""
    files = sources.matching_files(pattern, "tar")

    def read(shard: int) -> Iterator[Example | Problem]:
        # Interleaved ids: how many examples the other tars have is not known.
        return _read_tar(files[shard], iter(range(shard, 2**63, len(files))))

    stats = [os.stat(file) for file in files]
    sizes = ((os.path.basename(f), s.st_size) for f, s in zip(files, stats))
    times = [stat.st_mtime_ns for stat in stats]
    return Source(len(files), read, None, [], sources.sha256_of(sizes), times)


def _read_tar(file: str, ids: Iterator[int]) -> Iterator[Example | Problem]:
    tar_name = os.path.basename(file)
    key, members, count = "", {}, 0
    reason = "it does not end as a tar does: cut or damaged"
    try:
        with tarfile.open(file, "r|*", tarinfo=_TarInfo) as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                extension = extension.lower()
                if not member.isfile() or extension not in _IMAGES | _TEXTS:
                    continue
                if members and os.path.join(folder, stem) != key:
                    yield _example(f"{tar_name}/{key}", members, next(ids))
                    members, count = {}, count + 1
                key = os.path.join(folder, stem)
                members[extension] = tar.extractfile(member).read()
            is_whole = getattr(tar, "is_whole", False)
    except _CUT as error:
        if getattr(error, "errno", None):
            raise UserError(f"{file!r} cannot be read: {error.strerror}") from None
        is_whole, reason = False, f"{type(error).__name__}: {error}"
    # The last members before a cut may lack their image or their caption.
    complete = bool(_TEXTS & members.keys() and _IMAGES & members.keys())
    if members and (is_whole or complete):
        yield _example(f"{tar_name}/{key}", members, next(ids))
        count += 1
    if not is_whole:
        yield Problem(tar_name, f"{reason}; after {count} examples")


def _example(name: str, members: dict[str, bytes], id: int) -> Example | Problem:
    images = sorted(_IMAGES & members.keys())
    if not images:
        return Problem(name, "has a caption, but no picture")
    if "txt" in members:
        caption = members["txt"]
    elif "json" in members:
        try:
            caption = json.loads(members["json"])["caption"]
            caption = caption if isinstance(caption, str) else ""
        except UnicodeDecodeError:
            caption = members["json"]  # `make_example` says that it is not UTF-8
        except (ValueError, KeyError, TypeError):
            caption = ""
    else:
        return Problem(name, "has no .txt or .json beside it")
    image = members[images[0]]
    return sources.make_example(id, name, caption, lambda: image)


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
