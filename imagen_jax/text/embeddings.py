"""Embeddings of captions: computed in padded groups, stored as ragged rows.

A stored token of width D is one row. "bfloat16": D little-endian values. "int8": the
row's scale as a little-endian float32, then D int8 values; the embedding is their
product, rounded to bfloat16. The scale is the row's largest magnitude over 127.
"""

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from imagen_jax.errors import UserError

DTYPES = ("bfloat16", "int8")
SCALE_BYTES = 4
# Captions in one call of an encoder, and the lengths that it is compiled for.
ROWS = 64
_LENGTHS = (16, 32, 64, 128)


def encode_groups(
    tokens: list[list[int]],
    length: int,
    run: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rows: int = ROWS,
) -> list[np.ndarray]:
    """`[n_i, D]` bfloat16 for each caption, embedded in groups of one padded length.

    Args:
      tokens: ids of each caption, not empty; equal captions are embedded once.
      length: tokens kept of each caption; a longer one keeps its last, the end token.
      run: `(ids, mask) -> [rows, L, D]`, with ids `[rows, L]` int32 that are zero
        where the mask `[rows, L]` is False.
      rows: captions in a group; the last group is filled up with empty rows.
    """
    tokens = [
        tuple(t if len(t) <= length else t[: length - 1] + t[-1:]) for t in tokens
    ]
    groups: dict[int, list[tuple[int, ...]]] = {}
    for caption in dict.fromkeys(tokens):
        groups.setdefault(_padded_length(len(caption)), []).append(caption)
    embedded = {}
    for padded, group in sorted(groups.items()):
        for start in range(0, len(group), rows):
            chunk = group[start : start + rows]
            ids = np.zeros((rows, padded), np.int32)
            mask = np.zeros((rows, padded), bool)
            for i, caption in enumerate(chunk):
                ids[i, : len(caption)] = caption
                mask[i, : len(caption)] = True
            out = np.asarray(run(ids, mask))
            for i, caption in enumerate(chunk):
                # A copy: a view would keep the whole group in memory.
                row = np.array(out[i, : len(caption)], ml_dtypes.bfloat16)
                embedded[caption] = row
    return [embedded[caption] for caption in tokens]


def _padded_length(n: int) -> int:
    fitting = (step for step in _LENGTHS if n <= step)
    return next(fitting, math.ceil(n / _LENGTHS[-1]) * _LENGTHS[-1])


def row_bytes(dim: int, dtype: str = "bfloat16") -> int:
    """Bytes of one stored token."""
    return 2 * dim if dtype == "bfloat16" else SCALE_BYTES + dim


def to_bytes(rows: np.ndarray, dtype: str = "bfloat16") -> bytes:
    """`[n, D]` floats to bytes, row by row."""
    if dtype == "bfloat16":
        return rows.astype(ml_dtypes.bfloat16).view("<u2").tobytes()
    rows = rows.astype(np.float32)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    values = np.rint(rows / np.where(scale > 0, scale, 1)).astype(np.int8)
    scale = scale.astype("<f4").view(np.int8)
    return np.concatenate([scale, values], axis=1).tobytes()


def from_bytes(data: bytes, dim: int, dtype: str = "bfloat16") -> np.ndarray:
    """The inverse of `to_bytes`: `[n, dim]` bfloat16."""
    if dtype == "bfloat16":
        return np.frombuffer(data, "<u2").view(ml_dtypes.bfloat16).reshape(-1, dim)
    rows = np.frombuffer(data, np.int8).reshape(-1, SCALE_BYTES + dim)
    scale = np.ascontiguousarray(rows[:, :SCALE_BYTES]).view("<f4")
    return (rows[:, SCALE_BYTES:] * scale).astype(ml_dtypes.bfloat16)


def cosine_error(rows: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """1 - cosine between each row of two `[n, D]` arrays: `[n]` float64, at least 0.

    A row of zeros that is stored as zeros has no error.
    """
    a, b = rows.astype(np.float64), stored.astype(np.float64)
    same = (a == b).all(axis=1)
    norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    cosine = (a * b).sum(1) / np.where(norms > 0, norms, 1)
    return np.where(same, 0.0, np.maximum(0.0, 1 - cosine))


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A caption's embedding as it is stored."""

    data: bytes  # `to_bytes` of its tokens
    tokens: int  # number of tokens that are stored
    cut: bool  # whether the caption has more
    errors: np.ndarray  # [tokens] float64, cosine errors against the encoder's output


class Embedder:
    """Embeds captions, and caches results of up to `memory_bytes`.

    Results do not depend on it: an encoder embeds each caption by itself.
    """

    def __init__(self, encoder, length: int, dtype: str, memory_bytes: int = 2**30):
        self.encoder, self.length, self.dtype = encoder, length, dtype
        self._memory_bytes = self._free = memory_bytes
        self._known: dict[str, Embedded] = {}

    def embed(self, captions: list[str]) -> list[Embedded]:
        """One result per caption, in their order.

        Raises:
          UserError: for an embedding that is not finite.
        """
        if self._free < 0:
            self._known.clear()
            self._free = self._memory_bytes
        new = [c for c in dict.fromkeys(captions) if c not in self._known]
        if new:
            rows = self.encoder.encode(new, self.length)
            self._known |= {c: self._store(c, row) for c, row in zip(new, rows)}
            self._free -= sum(len(self._known[caption].data) for caption in new)
        return [self._known[caption] for caption in captions]

    def _store(self, caption: str, row: np.ndarray) -> Embedded:
        if not np.isfinite(row.astype(np.float32)).all():
            raise UserError(
                f"the text encoder {self.encoder.identity!r} answers {caption!r} with "
                "a number that is not finite: are its weights damaged?"
            )
        data = to_bytes(row, self.dtype)
        stored = from_bytes(data, self.encoder.dim, self.dtype)
        cut = len(self.encoder.tokenize(caption)) > self.length
        return Embedded(data, len(row), cut, cosine_error(row, stored))
