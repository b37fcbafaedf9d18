"""Images in a folder, captioned by a table or by texts beside them; COCO's captions."""

import os
import pathlib
import posixpath
from typing import Any

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.files import read_json, read_rows
from imagen_jax.preparing import names
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import (
    CAPTIONS,
    Problem,
    Rest,
    Source,
    caption_in,
    first_lines,
    make_example,
    numbered,
    sha256_of,
)

# Of two in a folder the first is read.
_TABLES = ("metadata.jsonl", "metadata.csv")
_TEXTS = (".txt", ".caption")
_COLUMNS = ("text", *CAPTIONS)
_TAKES = (
    f"taken are pictures ({', '.join(names.IMAGES)}) with NAME.txt or NAME.caption "
    "beside NAME.png, or in a metadata.jsonl or .csv (file_name; text, caption, prompt "
    "or --caption_column); or pictures alone, with --no_captions"
)
# Five captions of each of COCO's 118,287 pictures take 88 MiB.
_COCO_BYTES = 2**30


def open_folder(folder: str, settings: Settings) -> Source:
    """The images of a folder and its subfolders, shuffled.

    Where a folder or one above it has a metadata.jsonl or .csv, the captions are those
    of its rows, else those of the .txt or .caption files beside the images.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {folder!r}")
    files, problems, counts = names.list_files(root)
    holds = len(files) + len(problems) + counts.total()
    tables, captions = {}, {}
    for table in () if settings.no_captions else reversed(_TABLES):
        own = [name for name in files if posixpath.basename(name) == table]
        tables |= {posixpath.dirname(name): name for name in own}
    for place in sorted(tables):  # the nearest to an image comes last
        found, faults = _read_table(root, tables[place], settings)
        captions |= found
        problems += faults
    entries, loose = [], []
    for name in files:
        if name in captions:
            entries.append((name, captions[name], 1))
        elif not (table := _table_above(name, tables)):
            loose.append(name)
        elif name == table:
            counts["used"] += 1
        elif names.ending(name) in names.IMAGES:
            problems.append(Problem(name, f"not in {table}"))
        else:
            counts[names.kind_of(name)] += 1
    for name in captions.keys() - set(files):
        problems.append(Problem(name, "has a caption, but there is no such picture", 0))
    texts = () if settings.no_captions else _TEXTS
    pairs, alone, others = names.sort_out(loose, texts)
    problems += alone
    for image, text, parts in pairs:
        try:
            caption = text and first_lines((root / text).read_bytes(), settings)
            entries.append((image, caption, parts))
        except OSError as error:
            reason = f"{text} cannot be read: {error.strerror}"
            problems.append(Problem(image, reason, parts))
    rest = Rest(holds, +(counts + others))
    return _source(settings, root, entries, problems, rest, _TAKES)


def _table_above(name: str, tables: dict[str, str]) -> str:
    """The table of the nearest folder around a file that has one, or ""."""
    while name:
        name = posixpath.dirname(name)
        if name in tables:
            return tables[name]
    return ""


def _read_table(
    root: pathlib.Path, table: str, settings: Settings
) -> tuple[dict[str, list], list[Problem]]:
    """The captions by the names of images below `root`; rows that name no image."""
    asked = [settings.caption_column] if settings.caption_column else _COLUMNS
    captions, problems, keys = {}, [], {}
    kind = names.ending(table)[1:]
    for number, row in read_rows(root / table, "captions", kind):
        keys |= dict.fromkeys(filter(None, row))
        file, caption = row.get("file_name"), caption_in(row, settings, _COLUMNS)
        reason = "" if isinstance(file, str) and file else "has no file_name"
        if None in row:  # `csv` has there what is too much
            reason = "has more values than columns: quote texts that have commas"
        if reason:
            problems.append(Problem(f"{table} line {number}", reason, 0))
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(table), file))
        more = caption if isinstance(caption, list) else [caption]
        captions.setdefault(name, []).extend(more)
    if keys and not ("file_name" in keys and keys.keys() & set(asked)):
        raise UserError(
            f"{str(root / table)!r} has {', '.join(keys)}; it needs file_name and "
            f"{' or '.join(asked)} (or name another with --caption_column)"
        )
    return captions, problems


def open_coco(file: str, settings: Settings) -> Source:
    """The images that COCO's captions_SPLIT.json lists, shuffled.

    They lie in SPLIT, images/SPLIT or images, or beside the file; or in these beside
    the folder of the file.
    """
    path, what = pathlib.Path(file), "captions as COCO has them"
    values = read_json(path, what, _COCO_BYTES)
    try:
        images = [(row["id"], row["file_name"]) for row in values["images"]]
        captions = {id: [] for id, _ in images}
        rows = values["annotations"]
        found = [(row["image_id"], caption_in(row, settings)) for row in rows]
        unlisted = {id for id, _ in found} - captions.keys()
        if not all(isinstance(name, str) for _, name in images):
            raise TypeError("a file_name is no text")
        if found and not (settings.no_captions or any(text for _, text in found)):
            raise KeyError("caption")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file!r} is not {what}: it needs images (id, file_name) and annotations "
            f"(image_id, caption or --caption_column), but has {', '.join(values)} "
            f"({type(error).__name__}: {error})"
        ) from None
    root = _coco_folder(path, [name for _, name in images])
    for id, caption in found:
        if id not in unlisted:
            captions[id].append(caption)
    reason, entries = "has a caption, but is not listed", []
    problems = [Problem(f"image {id}", reason, 0) for id in unlisted]
    for id, name in images:
        if (root / name).is_file():
            entries.append((name, captions[id], 1))
        else:
            problems.append(Problem(name, f"is not in {root}"))
    return _source(settings, root, entries, problems, Rest(len(images)))


def _coco_folder(path: pathlib.Path, files: list[str]) -> pathlib.Path:
    """The folder of the images: the first that has one of the first of them."""
    split = path.stem.removeprefix("captions_")
    folders = [
        base / inner
        for base in (path.parent, path.parent.parent)
        for inner in (split, f"images/{split}", "images", "")
    ]
    for folder in folders:
        if any((folder / name).is_file() for name in files[:100]):
            return folder
    tried = ", ".join(str(folder) for folder in folders)
    raise UserError(f"the pictures of {str(path)!r} are not beside it, in {tried}")


def _source(
    settings: Settings,
    root: pathlib.Path,
    entries: list[tuple[str, Any, int]],
    problems: list[Problem],
    rest: Rest,
    takes: str = "",
) -> Source:
    """A source of (name, caption, parts) below `root`, in the order of the seed."""
    examples, problems = [], list(problems)
    for name, caption, parts in sorted(entries, key=lambda entry: entry[0]):
        read = (root / name).read_bytes
        item = make_example(settings, len(examples), name, caption, read, parts)
        (problems if isinstance(item, Problem) else examples).append(item)
    # Neighbours in a folder are alike, and the shuffle buffer of a training may be too
    # small to part them.
    order = np.random.default_rng(settings.seed).permutation(len(examples))
    stats = [os.stat(root / e.name) for e in examples]
    sizes = ((e.name, e.caption, s.st_size) for e, s in zip(examples, stats))
    return numbered(
        len(examples),
        settings,
        lambda rows: (examples[order[i]] for i in rows),
        sha256_of(sizes),
        rest,
        times=[stat.st_mtime_ns for stat in stats],
        problems=sorted(problems),
        takes=takes,
    )
