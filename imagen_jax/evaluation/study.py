"""Studies: pictures and questions in a folder that tells raters nothing else."""

import collections
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from imagen_jax import images
from imagen_jax.errors import UserError, needing_room
from imagen_jax.evaluation.prompts import read_prompts
from imagen_jax.files import TEMPORARY, is_file_name, read_rows

# Imagen, section 3, has batches of 50 with controls among them, not how many: one in
# ten, ours.
BATCH, CONTROLS = 50, 5
# A picture of so many cells a side is spoiled, whatever it shows. Ours.
_CELLS = (6, 6)


class Row(NamedTuple):
    """Pictures of one prompt: their files by what they are, "a", "b", "reference"."""

    caption: str
    category: str
    files: Mapping[str, pathlib.Path]
    image: str = ""  # as a `Prompt` has it


class Control(NamedTuple):
    """A picture `[H, W, 3]` uint8, a caption that is right, and one that is wrong."""

    picture: np.ndarray
    right: str
    wrong: str


def read_samples(folders: Mapping[str, str]) -> list[Row]:
    """The pictures in folders of `sample`, put together by their prompts.

    The n-th picture of a prompt belongs to the n-th of it in the other folders. What
    not all have is left out.

    Raises:
      UserError: when a folder has no samples.jsonl, or they share no prompt.
    """
    found = {}
    for name, folder in folders.items():
        lines, times = {}, collections.Counter()
        path = pathlib.Path(folder) / "samples.jsonl"
        for number, line in read_rows(path, "the lines of `sample`", "jsonl"):
            texts = [line.get(one, "") for one in ("prompt", "category", "image")]
            is_text = all(isinstance(text, str) for text in texts)
            if not (is_text and texts[0] and is_file_name(line.get("file"))):
                raise UserError(f"{path} line {number} names no prompt and file")
            prompt, *known = texts
            file = pathlib.Path(folder) / line["file"]
            if not file.is_file():
                raise UserError(f"{path} line {number} names {file.name}: it is gone")
            lines[prompt, times[prompt]] = file, *known
            times[prompt] += 1
        found[name] = lines
    first, *others = found.values()
    rows = [
        Row(key[0], category, {name: found[name][key][0] for name in found}, image)
        for key, (_, category, image) in first.items()
        if all(key in other for other in others)
    ]
    if not rows:
        raise UserError(f"no prompt has a picture in {' and '.join(folders.values())}")
    return rows


def with_references(rows: Sequence[Row], folder: str) -> list[Row]:
    """The rows with the pictures of `folder` that their prompts describe.

    The lines of `sample` name them where the prompts did (COCO's, file_name); else the
    folder's metadata.jsonl or .csv does.

    Raises:
      UserError: when one has none.
    """
    root = pathlib.Path(folder)
    tables = [root / f"metadata.{kind}" for kind in ("jsonl", "csv")]
    captions = {}
    for table in filter(pathlib.Path.is_file, tables):
        captions |= {one.text: one.image for one in read_prompts(str(table))}
    found = []
    for row in rows:
        name = row.image or captions.get(row.caption)
        if not name or not (root / name).is_file():
            raise UserError(
                f"--reference={folder} has no picture for {row.caption!r:.99}: the "
                "prompts that were sampled name them (COCO's, or a file_name column), "
                "or a metadata.jsonl in the folder does (file_name, text)"
            )
        found.append(row._replace(files={**row.files, "reference": root / name}))
    return found


class _Study:
    """Pictures under names that say nothing, and the key to them."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.trials = {}

    def name(self) -> str:
        """A new name, of 16 random letters."""
        return self.rng.bytes(8).hex()

    def add(self, picture: np.ndarray) -> str:
        """Writes a picture; returns its name."""
        path = self.folder / f"{self.name()}.png"
        images.save(path, picture)
        # The order in which they were written would tell which belong together.
        os.utime(path, (0, 0))
        return path.name

    def ask(self, question: str, pictures: Mapping[str, str], **known: str) -> str:
        """Adds a trial, of pictures by their names; returns its own."""
        about = {"caption": "", "category": "", "right": ""} | known
        name = self.name()
        self.trials[name] = {"question": question, "pictures": pictures, **about}
        return name

    def batch(self, trials: Sequence[str]) -> list[dict[str, Any]]:
        """What raters are told of a batch; in the order of names, which are random."""
        shown = []
        for name in sorted(trials):
            trial = self.trials[name]
            shown.append({"trial": name, "pictures": sorted(trial["pictures"])})
            if trial["question"] == "alignment":
                shown[-1]["caption"] = trial["caption"]
        return shown


def build(
    output: str,
    rows: Sequence[Row],
    spare: Sequence[Row],
    controls: Sequence[Control],
    seed: int,
) -> dict[str, Any]:
    """Writes the folder; returns the key, which is not in it.

    Args:
      output: a folder that does not exist.
      rows: what is rated. Of each, quality is asked of every model's picture beside
        the reference, or of "a" beside "b", and alignment of every picture.
      spare: others, whose photographs are for controls. One that is rated would be
        known again, and known to be real.
      controls: taken in turn.
      seed: decides names and batches.

    Raises:
      UserError: when a picture cannot be read, or the disk is full.
    """
    partial = pathlib.Path(f"{output}{TEMPORARY}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with needing_room(partial.parent):
        study, batches = _Study(partial, seed), []
        asked = _ask(study, rows)
        checks = {"quality": _spoiled_pairs(study, spare, controls)}
        checks["alignment"] = _captioned(study, controls)
        for question, trials in asked.items():
            parts = -(-len(trials) // (BATCH - CONTROLS))
            mixed = [str(trial) for trial in study.rng.permutation(trials)]
            for i in range(parts):
                own = itertools.islice(checks[question], CONTROLS)
                batches.append(study.batch([*mixed[i::parts], *own]))
        shown = {"study": study.name(), "batches": batches}
        # In a script "</script>" would end it.
        data = json.dumps(shown).replace("<", "\\u003c")
        page = pathlib.Path(__file__).with_name("rate.html").read_text("utf8")
        (partial / "index.html").write_text(page.replace("STUDY", data, 1), "utf8")
        os.rename(partial, output)
    return {"study": shown["study"], "trials": study.trials}


def _ask(study: _Study, rows: Sequence[Row]) -> dict[str, list[str]]:
    """The trials of each question, their pictures written."""
    asked = {"quality": [], "alignment": []}
    for row in rows:
        about = {"caption": row.caption, "category": row.category}
        names = {model: study.add(_read(row, model)) for model in row.files}
        others = ["reference"] if "reference" in names else ["b"]
        for model, other in itertools.product(names, others):
            if model != other:
                pair = {names[model]: model, names[other]: other}
                asked["quality"].append(study.ask("quality", pair, **about))
        for model, name in names.items():
            asked["alignment"].append(study.ask("alignment", {name: model}, **about))
    return asked


def _read(row: Row, model: str) -> np.ndarray:
    """A picture `[H, W, 3]` uint8: of a reference the middle, as large as a sample."""
    if model != "reference":
        return images.read(row.files[model])
    size = images.read(row.files["a"]).shape[:2]
    try:
        with images.opened(row.files[model].read_bytes()) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            width, height = upright.size
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            middle = upright.crop((left, top, left + side, top + side))
            return np.asarray(middle.resize(size, Image.Resampling.BICUBIC))
    except (OSError, images.Unusable) as error:
        raise UserError(f"{row.files[model]} cannot be used: {error}") from None


def _spoiled_pairs(
    study: _Study, spare: Sequence[Row], controls: Sequence[Control]
) -> Iterator[str]:
    """Controls of quality: a photograph, or what is drawn, beside itself spoiled."""
    photos = [row for row in spare if "reference" in row.files] or [None]
    for row, control in zip(itertools.cycle(photos), itertools.cycle(controls)):
        picture = _read(row, "reference") if row else control.picture
        coarse = Image.fromarray(picture).resize(_CELLS, Image.Resampling.BOX)
        coarse = coarse.resize(picture.shape[1::-1], Image.Resampling.NEAREST)
        right, wrong = study.add(picture), study.add(np.asarray(coarse))
        pair = {right: "clear", wrong: "spoiled"}
        yield study.ask("quality", pair, right=right)


def _captioned(study: _Study, controls: Sequence[Control]) -> Iterator[str]:
    """Controls of alignment: every other caption is wrong."""
    for i, control in enumerate(itertools.cycle(controls)):
        caption, right = (control.wrong, "no") if i % 2 else (control.right, "yes")
        name = study.add(control.picture)
        yield study.ask("alignment", {name: "drawn"}, caption=caption, right=right)
