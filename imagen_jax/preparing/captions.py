"""Captions to the bytes of their embeddings."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from imagen_jax.preparing.sources import Verified
from imagen_jax.text import embeddings

# Captions in one call of the encoder.
_CAPTIONS = 256
# Embeddings of earlier captions in memory: of T5-XXL in bfloat16 6,500 captions of 20
# tokens, enough for those that come again and again.
_MEMORY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A caption's embedding as it is stored.

    Attributes:
      data: `embeddings.to_bytes` of its tokens.
      tokens: number of tokens that are stored.
      cut: whether the caption has more.
      errors: `[tokens]` float64, cosine error of each against the encoder's output.
    """

    data: bytes
    tokens: int
    cut: bool
    errors: np.ndarray


class Embedder:
    """Embeds captions; equal ones once, as long as they are remembered.

    The captions used last are remembered, in bounded memory. Results do not depend on
    it: an encoder embeds each caption by itself.

    Attributes:
      encoder: the text encoder.
      encoded: number of captions that went through it.
      dtype: the type in which embeddings are stored.
    """

    def __init__(
        self, encoder, length: int, dtype: str, memory_bytes: int = _MEMORY_BYTES
    ):
        """
        Args:
          encoder: a text encoder (`imagen_jax.text.encoders`).
          length: tokens of a caption that are kept.
          dtype: one of `embeddings.DTYPES`.
          memory_bytes: bytes of embeddings that are remembered.
        """
        self.encoder = encoder
        self.encoded = 0
        self.dtype = dtype
        self._length = length
        # Least recently used first.
        self._known: collections.OrderedDict[str, Embedded] = collections.OrderedDict()
        self._free = memory_bytes

    def embed_items(
        self, items: Iterable[Verified]
    ) -> Iterator[tuple[Verified, Embedded]]:
        """Yields each item with the embedding of its caption."""
        items = iter(items)
        while chunk := list(itertools.islice(items, _CAPTIONS)):
            yield from zip(chunk, self.embed([item.caption for item in chunk]))

    def embed(self, captions: list[str]) -> list[Embedded]:
        """One result per caption, in their order."""
        results = {c: self._known[c] for c in captions if c in self._known}
        new = [c for c in dict.fromkeys(captions) if c not in results]
        if new:
            rows = self.encoder.encode(new, self._length)
            results |= {c: self._store(c, row) for c, row in zip(new, rows)}
            self.encoded += len(new)
        for caption, result in results.items():
            if caption not in self._known:
                self._known[caption] = result
                self._free -= len(result.data)
            self._known.move_to_end(caption)
        while self._free < 0:
            _, oldest = self._known.popitem(last=False)
            self._free += len(oldest.data)
        return [results[caption] for caption in captions]

    def expected_bytes(self, caption: str) -> int:
        """The bytes that a caption's embedding will have."""
        tokens = min(len(self.encoder.tokenize(caption)), self._length)
        return tokens * embeddings.row_bytes(self.encoder.dim, self.dtype)

    def _store(self, caption: str, row: np.ndarray) -> Embedded:
        data = embeddings.to_bytes(row, self.dtype)
        stored = embeddings.from_bytes(data, self.encoder.dim, self.dtype)
        return Embedded(
            data,
            len(row),
            len(self.encoder.tokenize(caption)) > self._length,
            embeddings.cosine_error(row, stored),
        )
