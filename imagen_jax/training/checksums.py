"""CRC-32 of a checkpoint's files, stored in the checkpoint itself.

TensorStore does not check array chunks: it reads a flipped byte as another number.
"""

import concurrent.futures
import dataclasses
import json
import zlib
from collections.abc import Collection, Iterator

import orbax.checkpoint as ocp
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import read_json

# Orbax finalizes items in alphabetical order; this one must come last.
ITEM = "verification"
_FILE = "files.json"


class _Handler(ocp.CheckpointHandler):
    def save(self, directory: epath.Path, args: "Checksums") -> None:
        """Does nothing: the other items are still being written."""

    restore = save  # `faults` reads the file.

    def finalize(self, directory: epath.Path) -> None:
        """Writes the checksums; all other items are final by now."""
        items = [path for path in directory.parent.iterdir() if path != directory]
        names = [name for item in items for name in _files(item, item.name)]
        listed = _sums(directory.parent, sorted(names))
        (directory / _FILE).write_text(json.dumps(listed, indent=0))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Checksums(ocp.args.CheckpointArgs):
    """Saves the checksums of all other items, as the item `ITEM`."""


def faults(
    folder: epath.Path, items: Collection[str], part: int = 0, parts: int = 1
) -> list[str]:
    """Damaged files of some items, one line each, in share `part` of `parts`."""
    listed = read(folder)
    names = [name for name in sorted(listed) if name.split("/")[0] in items]
    if not names or ".." in "/".join(names).split("/"):
        return [f"{ITEM}/{_FILE} is missing or damaged"]
    return [
        f"{name} {'has changed since it was written' if found else 'is missing'}"
        for name, found in _sums(folder, names[part::parts]).items()
        if found != listed[name]
    ]


def read(folder: epath.Path) -> dict[str, list[int]]:
    """`[bytes, CRC-32]` of every file of a checkpoint, none where they are damaged."""
    try:
        return read_json(folder / ITEM / _FILE, "the checksums of a checkpoint")
    except UserError:
        return {}


def _files(path: epath.Path, name: str) -> Iterator[str]:
    if path.is_dir():
        for below in path.iterdir():
            yield from _files(below, f"{name}/{below.name}")
    elif "/" in name:  # Orbax itself writes the files at the top, later.
        yield name


def _sums(folder: epath.Path, names: list[str]) -> dict[str, list[int]]:
    """`[bytes, CRC-32]` of each file, `[]` of one that cannot be read."""

    def measure(name: str) -> list[int]:
        size = crc = 0
        try:
            with (folder / name).open("rb") as file:
                while block := file.read(2**23):
                    size, crc = size + len(block), zlib.crc32(block, crc)
        except (OSError, ValueError):
            return []
        return [size, crc]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(measure, names), strict=True))
