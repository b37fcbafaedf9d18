"""Tars of pictures with captions, as img2dataset and webdataset write them.

KEY.jpg, KEY.png or KEY.webp stands by KEY.txt, or by KEY.json with a "caption"; the
key is the path up to the first dot of its last part. One tar is one shard.
"""

import io
import json
import lzma
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator

from imagen_jax.errors import UserError
from imagen_jax.preparing import sources as originals
from imagen_jax.preparing.folder import decode_caption

_PICTURES = {"bmp", "gif", "jpeg", "jpg", "png", "webp"}
_TEXTS = {"txt", "json"}
# Of what tarfile and the decompressors raise on damaged files. That a file cannot be
# read is an OSError as well, but one with a number.
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


def open_tars(pattern: str) -> originals.Originals:
    """The examples of the tars that match `pattern`, in the order of their names.

    What precedes the place where a tar is cut or damaged is used, the rest is one
    `Problem`.

    Raises:
      UserError: when no file matches.
    """
    files = originals.files_of(pattern, "tar")

    def read(shard: int) -> Iterator[originals.Example | originals.Problem]:
        # Interleaved: how many examples the other tars have is not known.
        numbers = range(shard, 2**63, len(files))
        return _read_tar(files[shard], numbers)

    count, exact = _count(files)
    sha256 = originals.sha256_of_files(files)
    return originals.Originals(len(files), read, count, [], sha256, exact)


def _count(files: list[str]) -> tuple[int | None, bool]:
    """Examples of all tars, and whether that is exact.

    By the statistics beside them, ours or img2dataset's, else by the first tar's.
    """
    total = 0
    for file in files:
        beside = pathlib.Path(file)
        beside = beside.with_name(beside.stem + "_stats.json")
        try:
            stats = json.loads(beside.read_text())
            total += stats["examples"] if "examples" in stats else stats["successes"]
        except (OSError, ValueError, KeyError, TypeError):
            break
    else:
        return total, True
    try:
        # Not compressed: only headers are read.
        with tarfile.open(files[0], "r:") as tar:
            pictures = sum(_split(name)[1] in _PICTURES for name in tar.getnames())
    except _CUT:
        return None, False
    sizes = [os.path.getsize(file) for file in files]
    return round(pictures * sum(sizes) / sizes[0]) or None, False


def _read_tar(file, numbers) -> Iterator[originals.Example | originals.Problem]:
    numbers = iter(numbers)
    tar_name = pathlib.Path(file).name
    group, of_group, yielded = "", {}, 0

    def finished():
        if of_group:
            yield _example(f"{tar_name}/{group}", of_group, next(numbers))

    reason = "it does not end as a tar does: cut or damaged"
    try:
        with tarfile.open(file, "r|*", tarinfo=_TarInfo) as tar:
            for member in tar:
                key, extension = _split(member.name)
                if not member.isfile() or extension not in _PICTURES | _TEXTS:
                    continue
                if key != group:
                    yielded += bool(of_group)
                    yield from finished()
                    group, of_group = key, {}
                of_group[extension] = tar.extractfile(member).read()
            is_whole = getattr(tar, "is_whole", False)
    except _CUT as error:
        if getattr(error, "errno", None):
            raise UserError(
                f"{file!r} cannot be read ({error.strerror}); start the same command "
                "again when it can"
            ) from None
        is_whole, reason = False, f"{type(error).__name__}: {error}"
    # The group at a cut may lack members.
    complete = bool(_TEXTS & of_group.keys() and _PICTURES & of_group.keys())
    if is_whole or complete:
        yielded += bool(of_group)
        yield from finished()
    if not is_whole:
        yield originals.Problem(tar_name, f"{reason}; after {yielded} examples")


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _example(name, members, number) -> originals.Example | originals.Problem:
    kinds = sorted(_PICTURES & members.keys())
    if not kinds:
        return originals.Problem(name, "has a caption, but no picture")
    caption = _caption(members)
    if caption is None:
        return originals.Problem(name, originals.NOT_UTF8)
    if not caption:
        known = _TEXTS & members.keys()
        reason = originals.EMPTY_CAPTION if known else "has no .txt or .json beside it"
        return originals.Problem(name, reason)
    picture = members[kinds[0]]
    return originals.Example(number, name, caption, lambda: picture)


def _caption(members: dict[str, bytes]) -> str | None:
    if "txt" in members:
        return decode_caption(members["txt"])
    if "json" not in members:
        return ""
    try:
        values = json.loads(members["json"])
    except UnicodeDecodeError:
        return None
    except ValueError:
        return ""
    caption = values.get("caption") if isinstance(values, dict) else ""
    return caption.strip() if isinstance(caption, str) else ""


def write_tar(path, rows) -> None:
    """Writes a tar that `open_tars` reads; equal rows make equal bytes.

    Args:
      path: of the file.
      rows: (key, extension, picture's file, values of its JSON) of each example.
    """
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for key, extension, picture, values in rows:
            text = json.dumps(values, ensure_ascii=False).encode()
            for name, data in ((extension, picture), ("json", text)):
                # As new: no owner, no time.
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
