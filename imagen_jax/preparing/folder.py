"""Images in a folder, captioned by a metadata.jsonl or by NAME.txt beside NAME.png."""

import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.preparing.images import Unusable
from imagen_jax.preparing.sources import (
    Example,
    Problem,
    Source,
    caption_text,
    sha256_of,
)

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_METADATA = "metadata.jsonl"


def open_folder(folder: str, seed: int, size: int) -> Source:
    """The images that `list_folder` finds, in a random order; `size` make a shard."""
    pairs, problems = list_folder(folder)
    root, count = pathlib.Path(folder), len(pairs)
    # Neighbours in a folder are alike, and the shuffle buffer of a training may be too
    # small to part them.
    order = np.random.default_rng(seed).permutation(count)

    def read(shard: int) -> Iterator[Example]:
        for i in order[shard * size : (shard + 1) * size].tolist():
            name, caption = pairs[i]
            yield Example(i, name, caption, (root / name).read_bytes)

    sizes = ((*pair, os.path.getsize(root / pair[0])) for pair in pairs)
    return Source(-(-count // size), read, count, problems, sha256_of(sizes))


def list_folder(folder: str) -> tuple[list[tuple[str, str]], list[Problem]]:
    """Finds the images of `folder` and its subfolders, and their captions.

    With a metadata.jsonl (one object a line, `file_name` and `text`) the captions are
    those of its lines, else those of the .txt files beside the images.

    Returns:
      (path relative to the folder, caption) of each image, sorted; and what lacks its
      image or a usable caption, sorted.

    Raises:
      UserError: for a missing folder, one without images or captions, and a malformed
        metadata.jsonl.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {folder!r} to take pictures from")
    files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    images = {name for name in files if name.lower().endswith(_IMAGES)}
    if not images:
        raise UserError(f"the folder {folder!r} has no pictures ({', '.join(_IMAGES)})")
    if _METADATA in files:
        captions = _read_metadata(root / _METADATA)
        no_caption = f"not in {_METADATA}"
    else:
        captions = _read_text_files(root, files, images)
        no_caption = "has no .txt file beside it"
    pairs, problems = [], [Problem(name, no_caption) for name in images - set(captions)]
    for name, caption in captions.items():
        try:
            if name not in images:
                raise Unusable("has a caption, but there is no such picture")
            pairs.append((name, caption_text(caption)))
        except Unusable as error:
            problems.append(Problem(name, str(error)))
    return sorted(pairs), sorted(problems)


def _read_metadata(path: pathlib.Path) -> dict[str, str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from None
    captions = {}
    for number, line in enumerate(lines, 1):
        where = f"{str(path)!r} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not valid JSON: {error.msg}") from None
        fields = values if isinstance(values, dict) else {}
        name, caption = fields.get("file_name"), fields.get("text")
        if not isinstance(name, str) or not isinstance(caption, str):
            raise UserError(
                f'{where} must be an object with "file_name" and "text", both strings'
            )
        name = pathlib.PurePosixPath(name).as_posix()
        if name in captions:
            raise UserError(f"{where} captions {name!r} a second time: keep one line")
        captions[name] = caption
    return captions


def _read_text_files(
    root: pathlib.Path, files: set[str], images: set[str]
) -> dict[str, bytes]:
    texts = {name[:-4]: name for name in files if name.lower().endswith(".txt")}
    stems = {name: name.rpartition(".")[0] for name in images}
    captioned = {name: texts[stem] for name, stem in stems.items() if stem in texts}
    if not captioned:
        raise UserError(
            f"the folder {str(root)!r} has pictures but no captions: give it a "
            f'{_METADATA} (lines of {{"file_name": ..., "text": ...}}) or a NAME.txt '
            "beside each NAME.png"
        )
    alone = set(texts.values()) - set(captioned.values())
    captioned |= {text: text for text in alone}
    return {name: (root / text).read_bytes() for name, text in captioned.items()}
