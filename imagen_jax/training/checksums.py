"""Checksums of a checkpoint's files, kept in the checkpoint and part of it.

TensorStore's checksums are those of its indices. Of the chunks of arrays there are
none: a flipped byte in one is read as another number (docs/checkpoints.md). CRC-32
finds every error of up to 32 neighbouring bits, and misses of others one in 2**32.
"""

import concurrent.futures
import dataclasses
import functools
import json
import zlib
from collections.abc import Collection, Mapping

import orbax.checkpoint as ocp
from etils import epath

# Orbax finalises items in the order of their names: this must be the last.
ITEM = "verification"
_FILE = "files.json"
# In the names of what Orbax has not finalised.
_UNFINISHED = ".orbax-checkpoint-tmp"
_FILE_BYTES = 2**28
_READ_BYTES = 2**23
_THREADS = 8
# Orbax has two folders in an item; links that lead in a circle come to an end.
_DEPTH = 4


class _Handler(ocp.CheckpointHandler):
    """Writes the checksums when all other items are final, before the whole is."""

    def save(self, directory: epath.Path, args: "Checksums") -> None:
        """There is nothing to write yet."""

    def restore(self, directory: epath.Path, args: "Checksums") -> None:
        """They are read by `faults`, without Orbax."""

    def finalize(self, directory: epath.Path) -> None:
        folder = directory.parent
        files = _files(folder, None)
        unfinished = [name for name in files if _UNFINISHED in name]
        if unfinished:
            raise RuntimeError(f"{unfinished[0]} is not final yet")
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            sums = pool.map(lambda name: _sum(folder / name), files)
            found = dict(zip(files, sums, strict=True))
        (directory / _FILE).write_text(json.dumps(found, indent=0))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Checksums(ocp.args.CheckpointArgs):
    """Saves the checksums of the other items; the item's name is `ITEM`."""


def faults(
    folder: epath.PathLike, items: Collection[str], part: int = 0, parts: int = 1
) -> list[str]:
    """What is wrong with a checkpoint's files, one line each; none when it is whole.

    Args:
      folder: of one step.
      items: that are looked at.
      part: which of `parts` shares of the files to read.
      parts: into which the work is divided.
    """
    folder = epath.Path(folder)
    try:
        # What has no length may be a pipe, which would be read for ever.
        if not 0 < (folder / ITEM / _FILE).stat().length < _FILE_BYTES:
            return [f"{ITEM}/{_FILE} is no list of checksums"]
        listed = json.loads((folder / ITEM / _FILE).read_text())
        listed = {name: (int(size), int(crc)) for name, (size, crc) in listed.items()}
    except OSError:
        return [f"{ITEM}/{_FILE} is missing"]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return [f"{ITEM}/{_FILE} is no list of checksums"]
    found = set(_files(folder, items))
    wanted = sorted(name for name in listed if name.split("/")[0] in items)
    lacking = [item for item in items if not any(_of(name, item) for name in wanted)]
    if lacking:
        return [f"{ITEM}/{_FILE} does not list {', '.join(sorted(lacking))}"]
    missing = [f"{name} is missing" for name in wanted if name not in found]
    if missing:
        return missing
    check = functools.partial(_fault, folder, listed)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return [line for line in pool.map(check, wanted[part::parts]) if line]


def _of(name: str, item: str) -> bool:
    return name.startswith(f"{item}/")


def _files(folder: epath.Path, items: Collection[str] | None) -> list[str]:
    """Paths of the files in `items` (default: all others than this file's own)."""
    names = []
    for item in sorted(folder.iterdir()):
        # Only looked into by Orbax when it lists checkpoints: what lies at the top.
        own = item.name != ITEM if items is None else item.name in items
        if own and item.is_dir():
            names += _below(item, item.name, _DEPTH)
    return sorted(names)


def _below(folder: epath.Path, name: str, depth: int) -> list[str]:
    # etils' own walk forgets the bucket.
    names = []
    for path in folder.iterdir():
        inside = f"{name}/{path.name}"
        if not path.is_dir():
            names.append(inside)
        elif depth:
            names += _below(path, inside, depth - 1)
    return names


def _sum(path: epath.Path) -> tuple[int, int]:
    """Length in bytes and CRC-32."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def _fault(folder: epath.Path, listed: Mapping[str, tuple[int, int]], name: str) -> str:
    try:
        size, crc = (folder / name).stat().length, 0
        if size == listed[name][0] > 0:
            size, crc = _sum(folder / name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    if size != listed[name][0]:
        return f"{name} has {size} bytes of {listed[name][0]}"
    return "" if crc == listed[name][1] else f"{name} has changed since it was written"
