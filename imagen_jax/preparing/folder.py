"""Images in a folder, captioned by a metadata.jsonl or by NAME.txt beside NAME.png."""

import json
import os
import pathlib

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.preparing.sources import Problem, Source, make_example, sha256_of

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_METADATA = "metadata.jsonl"


def open_folder(folder: str, seed: int, size: int) -> Source:
    """The images of a folder and its subfolders, shuffled; `size` make a shard.

    With a metadata.jsonl (one object a line, `file_name` and `text`) the captions are
    those of its lines, else those of the .txt files beside the images.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {folder!r}")
    files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    images = {name for name in files if name.lower().endswith(_IMAGES)}
    if _METADATA in files:
        captions = _read_metadata(root / _METADATA)
        images |= files & set(captions)  # whatever their names end in
        no_caption = f"not in {_METADATA}"
    else:
        captions = _read_text_files(root, files, images)
        no_caption = "has no .txt file beside it"
    examples = []
    problems = [Problem(name, no_caption) for name in images - set(captions)]
    for name, caption in sorted(captions.items()):
        if name not in images:
            item = Problem(name, "has a caption, but there is no such picture")
        else:
            read = (root / name).read_bytes
            item = make_example(len(examples), name, caption, read)
        (problems if isinstance(item, Problem) else examples).append(item)
    # Neighbours in a folder are alike, and the shuffle buffer of a training may be too
    # small to part them.
    order = np.random.default_rng(seed).permutation(len(examples))
    stats = [os.stat(root / e.name) for e in examples]
    sizes = ((e.name, e.caption, s.st_size) for e, s in zip(examples, stats))
    return Source(
        -(-len(examples) // size),
        lambda shard: (examples[i] for i in order[shard * size : (shard + 1) * size]),
        len(examples),
        sorted(problems),
        sha256_of(sizes),
        [stat.st_mtime_ns for stat in stats],
    )


def _read_metadata(path: pathlib.Path) -> dict[str, str]:
    """The captions by the names of the images."""
    captions = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{str(path)!r} line {number}"
        try:
            row = json.loads(line)
            name = pathlib.PurePosixPath(row["file_name"]).as_posix()
            caption = row["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            form = '{"file_name": "...", "text": "..."} in UTF-8'
            raise UserError(f"{where} must be {form}") from None
        if name in captions:
            raise UserError(f"{where} captions {name!r} a second time: keep one line")
        captions[name] = caption
    return captions


def _read_text_files(root, files, images) -> dict[str, bytes]:
    """The captions by the names of the images, or of files that have no image."""
    texts = {name[:-4]: name for name in files if name.lower().endswith(".txt")}
    stems = {name: name.rpartition(".")[0] for name in images}
    files_of = {name: texts[stem] for name, stem in stems.items() if stem in texts}
    files_of |= {text: text for text in set(texts.values()) - set(files_of.values())}
    return {name: (root / text).read_bytes() for name, text in files_of.items()}
