"""Drawn scenes in many other words, some of which are never trained on.

`scenes.caption` has 25 words; here each meaning has some twenty, and a sentence many
forms (words.txt). What is asked can then be something that no training caption said:
new wordings of trained words, or words that were never trained on. Pictures are judged
by the plain caption, `scenes.caption`.
"""

import functools
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from imagen_jax.shapes import scenes
from imagen_jax.shapes.scenes import Item, Scene

# What is said: "trained" is all that training captions say. "wordings" are sentences
# and pairs of colour and shape that these never have, of words that they have. "words"
# are words that they never have, for all colours, shapes, sizes, counts and relations.
KINDS = ("trained", "wordings", "words")

# Of the pairs of a trained colour word and a trained shape word, one in so many is kept
# for "wordings".
_KEPT_PAIRS = 5
_COUNTS = {2: "two", 3: "three"}
# Of a phrase like "circle with a hole", what comes after the noun.
_PHRASE = re.compile(r"(.+?)((?: of| on| with| for) .+)?")


class Choice(NamedTuple):
    """What can stand at one place of a caption."""

    trained: tuple[str, ...]
    never: tuple[str, ...]  # never trained on


@functools.cache
def words() -> dict[str, dict[str, Choice]]:
    """The words of each section of words.txt by their meanings, "colours" to "one".

    The sections of sentences have one meaning, "".
    """
    text = pathlib.Path(__file__).with_name("words.txt").read_text("utf8")
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\n  ", " ")
    found = {}
    for section in text.split("[")[1:]:
        name, *lines = filter(None, re.split(r"\]?\n", section))
        if "{" in lines[0]:
            never = tuple(line[2:] for line in lines if line[0] == "|")
            trained = tuple(line for line in lines if line[0] != "|")
            found[name] = {"": Choice(trained, never)}
        else:
            found[name] = dict(map(_meaning, lines))
    return found


def _meaning(line: str) -> tuple[str, Choice]:
    meaning, _, said = line.partition(": ")
    return meaning, Choice(*(tuple(s.strip().split(", ")) for s in said.split("|")))


def generate(count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """The scenes of `scenes.generate`, each with a caption of the kind "trained"."""
    for i, scene in enumerate(scenes.generate(count, seed)):
        yield scene, say(scene, "trained", np.random.default_rng((seed, 2, i)))


def is_kept(colour: str, shape: str) -> bool:
    """Whether a trained colour word never stands with a trained shape word."""
    return zlib.crc32(f"{colour} {shape}".encode()) % _KEPT_PAIRS == 0


def say(scene: Scene, kind: str, rng: np.random.Generator) -> str:
    """A caption of a scene, one of `KINDS`.

    >>> circle = Item("circle", "red", "small", 0.5, 0.5, 0.17)
    >>> say(Scene((circle,)), "words", np.random.default_rng(1))
    'the wee marble is vermilion'
    """

    def pick(section: str, meaning: str = "") -> str:
        choice = words()[section][meaning]
        # A new wording is a new sentence; a new word stands in a trained one.
        is_new = kind == ("words" if meaning else "wordings")
        return _one_of(choice.never if is_new else choice.trained, rng)

    def slots(item: Item) -> dict[str, str]:
        size = pick("sizes", item.size) if item.size else ""
        while True:
            colour, shape = pick("colours", item.colour), pick("shapes", item.shape)
            if kind == "words" or is_kept(colour, shape) == (kind == "wordings"):
                break
        plural = {"shapes": plural_of(shape), "thing": f"{size} {colour} {shape}"}
        return {"size": size, "colour": colour, "shape": shape, **plural}

    first, number = slots(scene.items[0]), len(scene.items)
    if scene.relation:
        first["other"] = slots(scene.items[1])["thing"]
        first["relation"] = pick("relations", scene.relation)
    elif number > 1:
        first["count"] = pick("counts", _COUNTS[number])
    form = "related" if scene.relation else "several" if number > 1 else "one"
    text = " ".join(pick(form).format(**first).split())
    return re.sub(r"\b([aA]) (?=[aeiou])", r"\1n ", text)


def _one_of(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]


def plural_of(phrase: str) -> str:
    """The plural of a noun, or of the noun of a phrase.

    >>> plural_of("box"), plural_of("penny"), plural_of("circle with a hole")
    ('boxes', 'pennies', 'circles with a hole')
    """
    noun, rest = _PHRASE.fullmatch(phrase).groups("")
    if re.search(r"(s|x|ch|sh)$", noun):
        return f"{noun}es{rest}"
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies{rest}"
    return f"{noun}s{rest}"
