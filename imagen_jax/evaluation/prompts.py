"""Prompts as people have them: lines, tables, COCO's captions; and two known sets."""

import collections
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.files import read_json, read_lines, read_rows


class Prompt(NamedTuple):
    """What a picture is made of, and what is known of it."""

    text: str
    category: str = ""
    image: str = ""  # file of the picture that it describes

    def known(self) -> dict[str, str]:
        """What the lines of a prompt's pictures say of it, beside its text."""
        known = {"category": self.category, "image": self.image}
        return {name: value for name, value in known.items() if value}


# Columns with these names, whatever the case of their letters. Of several the first.
_TEXT, _CATEGORY, _IMAGE = ("prompt", "caption", "text"), "category", "file_name"
# Five captions of each of COCO's 118,287 pictures take 88 MiB.
_COCO_BYTES = 2**30
# Imagen's App. C, counted in the published table; Parti's table of prompts.
DRAWBENCH = {
    "Colors": 25,
    "Conflicting": 10,
    "Counting": 19,
    "DALL-E": 20,
    "Descriptions": 20,
    "Gary Marcus et al.": 10,
    "Misspellings": 10,
    "Positional": 20,
    "Rare Words": 7,
    "Reddit": 38,
    "Text": 21,
}
_PARTIPROMPTS = 1_632


def read_prompts(
    file: str, column: str = "", count: int = 0, seed: int = 0
) -> list[Prompt]:
    """The prompts of a file, local or in a bucket, without spaces around them.

    Those of .csv, .tsv and .jsonl are in `column`, or in prompt, caption or text; .json
    is COCO's captions; any other file has one a line, or is a table if its first line
    names a prompt and a category. `count` are drawn at random, in the order in which
    `numpy.random.default_rng(seed).choice(n, count, replace=False)` has them: of
    captions, so that a picture of COCO may come twice. Without it all are in order.

    Raises:
      UserError: when the file is none of these, holds none or fewer than `count`, or
        has the name of a known set and is another one.
    """
    kind = os.path.splitext(file)[1].lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".json"):
        lines = read_lines(file, "prompts")
        kind = _kind(lines[0] if lines else "")
    if column and kind in ("", ".json"):
        raise UserError(f"--prompt_column={column}: {file} has no columns")
    if kind == ".json":
        prompts = list(_coco(file))
    elif kind:
        prompts = list(_table(file, kind[1:], column))
    else:
        prompts = [Prompt(line.strip()) for line in lines if line.strip()]
    for text, *_ in prompts:
        # Half of a pair, which JSON can write.
        if text != text.encode(errors="ignore").decode():
            raise UserError(f"{file} has a prompt that is no text: {text!r:.99}")
    if len(prompts) < max(count, 1):
        asked = f", not --count={count}" if count else ""
        raise UserError(f"{file} holds {len(prompts):,} prompts{asked}")
    _check_known(file, prompts)
    if not count:
        return prompts
    order = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
    return [prompts[i] for i in order]


def _kind(head: str) -> str:
    """Which table begins with this line, "" for none."""
    for kind, between in {".csv": ",", ".tsv": "\t"}.items():
        names = {name.strip(' "').lower() for name in head.split(between)}
        if _CATEGORY in names and names & set(_TEXT):
            return kind
    return ""


def _table(file: str, kind: str, column: str) -> Iterator[Prompt]:
    for number, row in read_rows(file, "prompts", kind):
        where = f"{file} line {number}"
        if kind != "jsonl" and (None in row or None in row.values()):
            raise UserError(
                f"{where} has more or fewer values than the first line has columns: "
                "quote prompts that have commas (.csv), or name the file .tsv"
            )
        values = {name.strip().lower(): value for name, value in row.items()}
        if not any(values.values()):
            continue  # rows that a spreadsheet leaves at its end
        asked = [column.strip().lower()] if column else _TEXT
        found = next((name for name in asked if name in values), None)
        if found is None:
            raise UserError(
                f"{where} has no {' or '.join(asked)}{did_you_mean(column, values)}, "
                f"but {', '.join(values)}: name another with --prompt_column"
            )
        known = [values.get(name) or "" for name in (found, _CATEGORY, _IMAGE)]
        if not (all(isinstance(one, str) for one in known) and known[0].strip()):
            raise UserError(f"{where} has no text for a prompt")
        yield Prompt(*map(str.strip, known))


def _coco(file: str) -> Iterator[Prompt]:
    values = read_json(file, "captions as COCO has them", _COCO_BYTES)
    try:
        names = {row["id"]: row["file_name"] for row in values["images"]}
        for row in values["annotations"]:
            yield Prompt(row["caption"].strip(), "", names[row["image_id"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not captions as COCO has them ({type(error).__name__}: {error})"
            "; end the name of a file of an object a line in .jsonl"
        ) from None


def _check_known(file: str, prompts: Sequence[Prompt]) -> None:
    """Raises `UserError` where a known set is not what its file's name says."""
    name = re.sub("[^a-z]", "", os.path.basename(file).lower())
    found = collections.Counter(prompt.category for prompt in prompts)
    if "drawbench" in name:
        known = DRAWBENCH if any(found) else {"": sum(DRAWBENCH.values())}
        differs = [
            f"{one or 'prompts'} {found[one]} for {known.get(one, 0)}"
            for one in {**known, **found}
            if found[one] != known.get(one, 0)
        ]
    elif "partiprompts" in name and len(prompts) != _PARTIPROMPTS:
        differs = [f"prompts {len(prompts):,} for {_PARTIPROMPTS:,}"]
    else:
        return
    if differs:
        raise UserError(
            f"{file} has the name of a known set and differs ({', '.join(differs)}): "
            "copy it again, or give it another name"
        )
