"""The captioned pictures that `prepare` starts from."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from imagen_jax.data import folder, shapes
from imagen_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture and its caption.

    Attributes:
      id: its number in the source.
      name: what messages call it.
      caption: not empty.
      read: returns the picture's file.
      stamp: what stands for the picture when sources are compared; "" is its bytes.
    """

    id: int
    name: str
    caption: str
    read: Callable[[], bytes]
    stamp: str = ""


@dataclasses.dataclass(frozen=True)
class Originals:
    """A source.

    Attributes:
      count: number of `examples`.
      examples: in the order in which they are to be written.
      problems: (name, reason) of what the source has besides and cannot be used.
    """

    count: int
    examples: Iterable[Example]
    problems: list[tuple[str, str]]


def open_originals(source: str, image_size: int, seed: int) -> Originals:
    """The examples of `source`; no picture is opened yet.

    Args:
      source: "folder:DIR" or "shapes:N".
      image_size: pixels of a side of drawn scenes.
      seed: of a folder's order, and of the drawn scenes.

    Raises:
      UserError: when there is no such source, or it is not as it must be.
    """
    kind, _, argument = source.partition(":")
    kinds = {"folder": _open_folder, "shapes": _open_shapes}
    if kind not in kinds or not argument:
        raise UserError(
            f"--source is {source!r}{did_you_mean(kind, kinds)}; it is folder:DIR or "
            "shapes:N"
        )
    return kinds[kind](argument, image_size, seed)


def _open_folder(argument: str, image_size: int, seed: int) -> Originals:
    listing = folder.list_folder(argument)
    root = pathlib.Path(argument)
    examples = [
        Example(i, name, caption, (root / name).read_bytes)
        for i, (name, caption) in enumerate(listing.pairs)
    ]
    # Neighbours in a folder are alike; a shuffle buffer in training may be too small
    # to part them.
    order = np.random.default_rng(seed).permutation(len(examples))
    return Originals(len(examples), [examples[i] for i in order], listing.problems)


def _open_shapes(argument: str, image_size: int, seed: int) -> Originals:
    if not argument.isdecimal() or int(argument) < 1:
        raise UserError(f"--source is 'shapes:{argument}'; give a number above zero")

    def examples() -> Iterator[Example]:
        for i, scene in enumerate(shapes.generate(int(argument), seed)):
            yield Example(
                i,
                f"scene {i}",
                shapes.caption(scene),
                lambda scene=scene: folder.encode_png(shapes.draw(scene, image_size)),
                repr(scene),
            )

    return Originals(int(argument), examples(), [])
