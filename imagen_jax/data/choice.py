"""Which records are trained on: those of `data.filter`, less the held-out ones."""

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from imagen_jax.config import DataConfig
from imagen_jax.data import order
from imagen_jax.data.manifest import Source
from imagen_jax.errors import UserError

_TESTS = {"<": operator.lt, "<=": operator.le, "==": operator.eq}
_TESTS |= {">": operator.gt, ">=": operator.ge}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PARTS = re.compile(rf"\s*(.+?)\s*(<=|>=|==|<|>)\s*({_NUMBER})\s*").fullmatch


def choice(
    data: DataConfig, source: Source, heldout: bool = False
) -> Callable[[Any, Any], Any] | None:
    """A function that tells which records are read; None where all are.

    It takes numbers `[...]` int64 and a mapping from names to scores `[...]` float32,
    in numpy or TensorFlow, and returns `[...]` bool. A score that is not known passes
    no test. `heldout` chooses what is kept from training.

    Raises:
      UserError: for a test that cannot be read, or of a score that there is not.
    """
    if not (data.filter or data.heldout_share):
        return None
    tests = [_parse(text, source) for text in data.filter]

    def is_chosen(ids, scores):
        # By the number alone: whatever the seed, a record never changes its side.
        drawn = order.draw(0, ids, 0, order.HELDOUT)
        chosen = (drawn < int(data.heldout_share * order.PRIME)) == heldout
        for name, test, number in tests:
            chosen &= test(scores[name], number)
        return chosen

    return is_chosen


def _parse(text: str, source: Source) -> tuple[str, Callable[[Any, Any], Any], Any]:
    scores = source.manifest.scores
    parts = _PARTS(text)
    if not parts or parts[1] not in scores:
        raise UserError(
            f"config.data.filter has {text!r}; write a score, one of "
            f"{', '.join(_TESTS)} and a number. {source.path!r} has the scores: "
            f"{', '.join(scores) or 'none'}"
        )
    return parts[1], _TESTS[parts[2]], np.float32(parts[3])


def nothing_left(path: str) -> UserError:
    """The error where no record is chosen."""
    return UserError(
        "config.data.filter and config.data.heldout_share choose no record of "
        f"{path!r}, or of a part of it that one reader reads: change them, or set a "
        "smaller config.data.readers"
    )
