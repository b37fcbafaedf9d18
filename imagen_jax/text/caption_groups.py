"""Captions of any length through a program that is compiled for few lengths."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

# Ids in T5's vocabulary.
PAD, END = 0, 1
# Captions in one call of an encoder, and the lengths it is compiled for.
ROWS = 64
_LENGTHS = (16, 32, 64, 128)


def encode_groups(
    tokens: list[list[int]],
    run: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rows: int = ROWS,
) -> list[np.ndarray]:
    """Embeds captions in groups that are padded to one of few lengths.

    Equal captions are embedded once.

    Args:
      tokens: of each caption, none of them empty.
      run: `(ids, mask) -> [rows, L, dim]`, of ids `[rows, L]` int32 that are padded
        with `PAD` where the mask `[rows, L]` is False.
      rows: captions in a group; the last one is filled up with empty rows.

    Returns:
      Of each caption `[n_i, dim]` bfloat16.
    """
    embedded = {}
    unique = list(dict.fromkeys(map(tuple, tokens)))
    for padded in sorted({_padded_length(len(t)) for t in unique}):
        group = [t for t in unique if _padded_length(len(t)) == padded]
        for start in range(0, len(group), rows):
            chunk = group[start : start + rows]
            ids = np.full((rows, padded), PAD, np.int32)
            mask = np.zeros((rows, padded), bool)
            for i, caption in enumerate(chunk):
                ids[i, : len(caption)] = caption
                mask[i, : len(caption)] = True
            out = np.asarray(run(ids, mask))
            for i, caption in enumerate(chunk):
                # A copy, or each row would keep the whole group in memory.
                row = np.array(out[i, : len(caption)], ml_dtypes.bfloat16)
                embedded[caption] = row
    return [embedded[tuple(t)] for t in tokens]


def cut(tokens: list[int], length: int) -> list[int]:
    """At most `length` tokens; the end stays, as in T5's own truncation."""
    return tokens if len(tokens) <= length else tokens[: length - 1] + [END]


def _padded_length(n: int) -> int:
    longest = _LENGTHS[-1]
    steps = (*_LENGTHS, math.ceil(n / longest) * longest)
    return next(step for step in steps if n <= step)
