"""Has people rate pictures as Imagen's paper did, or shows them side by side.

python -m imagen_jax.rate build --a=SAMPLES [--b=SAMPLES] [--reference=DIR] --output=DIR
python -m imagen_jax.rate score --key=DIR.key.json ANSWERS.json ... [--json=FILE]
python -m imagen_jax.rate page --samples=DIR --samples=DIR ... --output=DIR

`build` makes a folder that raters open in a browser, and beside it DIR.key.json, which
is not for them. They send back the answers that they download; `score` reads those.
See docs/rating.md.
"""

import json
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from absl import flags

from imagen_jax import cli
from imagen_jax.errors import UserError, did_you_mean, needing_room, printable
from imagen_jax.evaluation import ratings, side_by_side, study
from imagen_jax.files import read_json, write_text
from imagen_jax.shapes import scenes as shapes

# Of each command, the flags that it takes.
COMMANDS = {
    "build": ("a", "b", "reference", "count", "seed", "output"),
    "score": ("key", "json"),
    "page": ("samples", "scores", "output"),
}


# Drawn pictures for controls, and photographs; pixels a side of the former.
_SPARE, _SIDE = 50, 256


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("a", "", "build: a folder of `sample`")
    flags.DEFINE_string("b", "", "build: another one, of the same prompts")
    flags.DEFINE_string("reference", "", "build: folder of the prompts' photographs")
    flags.DEFINE_integer("count", 200, "build: pictures, drawn at random", 1)
    flags.DEFINE_integer("seed", 0, "build: of the draw, names and batches", 0)
    flags.DEFINE_string("output", "", "build, page: a new folder")
    flags.DEFINE_string("key", "", "score: what `build` wrote beside its folder")
    flags.DEFINE_string("json", "", "score: a file for the figures")
    flags.DEFINE_multi_string("samples", [], "page: a folder of `sample`; repeat")
    scores = "page: the --json of `evaluate`, one for each --samples"
    flags.DEFINE_multi_string("scores", [], scores)


def _new_folder(output: str) -> pathlib.Path:
    folder = pathlib.Path(output)
    if not output or folder.exists() or not folder.absolute().parent.is_dir():
        raise UserError(f"--output={output}: name a new folder, in one that exists")
    return folder


def controls(count: int) -> list[study.Control]:
    """Drawn pictures, whose wrong captions have no word right."""
    scenes = list(shapes.generate(count + 50, seed=0))
    words = [{w for i in s.items for w in (i.shape, i.colour)} for s in scenes]
    found = []
    for i in range(count):
        other = next(n for n in range(i, len(scenes)) if not words[n] & words[i])
        captions = shapes.caption(scenes[i]), shapes.caption(scenes[other])
        found.append(study.Control(shapes.draw(scenes[i], _SIDE), *captions))
    return found


def build(args) -> None:
    """Writes a folder for raters and, beside it, the key."""
    folder = _new_folder(args.output)
    key = folder.with_name(f"{folder.name}.key.json")
    if key.exists():
        raise UserError(f"{key} is the key of another folder: give another --output")
    if not args.a or not (args.b or args.reference):
        raise UserError("give --a, and what it is compared with: --b or --reference")
    folders = {"a": args.a} | ({"b": args.b} if args.b else {})
    rows = study.read_samples(folders)
    order = np.random.default_rng(args.seed).permutation(len(rows))
    rows = [rows[i] for i in order[: args.count + _SPARE]]
    if args.reference:
        rows = study.with_references(rows, args.reference)
        folders["reference"] = args.reference
    rated, spare = rows[: args.count], rows[args.count :]
    made = study.build(str(folder), rated, spare, controls(_SPARE), args.seed)
    write_text(key, json.dumps({"folders": folders, "seed": args.seed, **made}) + "\n")
    print(
        f"{len(rated)} pictures of each. Send {printable(folder)}, whose index.html "
        f"raters open,\nand keep {printable(key)}, which says which is which"
    )


def score(args, files: Sequence[str]) -> None:
    """Prints what the answers say."""
    cli.check_json(args.json)
    if not (args.key and files):
        raise UserError("give --key=DIR.key.json of `rate build`, and files of answers")
    key = read_json(args.key, "the key of `rate build`")
    if not {"study", "trials"} <= key.keys():
        raise UserError(f"{args.key} is not the key of `rate build`")
    answers = {file: read_json(file, "the answers of a rater") for file in files}
    report = ratings.score(key, ratings.read_answers(key, answers))
    cli.write_json(args.json, {"folders": key.get("folders"), **report})
    print(ratings.table(report))


def _by_category(file: str) -> dict[str, dict[str, float]]:
    """The "categories" in a file of `evaluate --json`: of each, figures by names."""
    found = read_json(file, "figures by category").get("results")
    try:
        (found,) = (result["categories"] for result in found)
        return {
            category: {name: float(value) for name, value in figures.items()}
            for category, figures in found.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{file} has no figures by category of one group of samples: give the "
            "--json of `evaluate` for prompts with categories"
        ) from None


def page(args) -> None:
    """Writes a folder with a page of the pictures of all --samples."""
    folder = _new_folder(args.output)
    names = [pathlib.Path(one).resolve().name for one in args.samples]
    if len(set(names)) < max(2, len(names)):
        raise UserError("give two or more --samples, folders with different names")
    if args.scores and len(args.scores) != len(names):
        raise UserError("give --scores once for each of --samples, in their order")
    rows = study.read_samples(dict(zip(names, args.samples)))
    scores = dict(zip(names, map(_by_category, args.scores)))
    with needing_room(folder.parent):
        for name in names:
            (folder / name).mkdir(parents=True)
            for row in rows:
                shutil.copy(row.files[name], folder / name)
        text = side_by_side.page(rows, scores)
        (folder / "index.html").write_text(text, "utf8")
    print(f"{len(rows)} pictures of each; open {printable(folder / 'index.html')}")


def main(words: Sequence[str]) -> None:
    """Runs the command that the words begin with."""
    args = flags.FLAGS
    command, *files = words or [""]
    if command not in COMMANDS:
        near = did_you_mean(command, COMMANDS)
        raise flags.Error(f"there is no {command!r}{near}; {', '.join(COMMANDS)}")
    for name in {name for own in COMMANDS.values() for name in own}:
        if args[name].present and name not in COMMANDS[command]:
            raise flags.Error(f"--{name} is not for `rate {command}`")
    if files and command != "score":
        raise flags.Error(f"{files[0]!r} is no flag")
    if command == "build":
        build(args)
    elif command == "score":
        score(args, files)
    else:
        page(args)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
