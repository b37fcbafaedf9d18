"""Captions to the bytes of their embeddings."""

import collections
import dataclasses

import numpy as np

from imagen_jax.text import embeddings

# Embeddings of earlier captions in memory: of T5-XXL in bfloat16 6,500 captions of 20
# tokens, enough for those that come again and again.
_MEMORY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A caption's embedding as it is stored."""

    data: bytes  # `embeddings.to_bytes` of its tokens
    tokens: int  # number of tokens that are stored
    cut: bool  # whether the caption has more
    errors: np.ndarray  # [tokens] float64, cosine errors against the encoder's output


class Embedder:
    """Embeds captions; equal ones once, as long as they are remembered.

    The captions used last are remembered. Results do not depend on it: an encoder
    embeds each caption by itself. `encoded` counts the captions that it was given.
    """

    def __init__(
        self, encoder, length: int, dtype: str, memory_bytes: int = _MEMORY_BYTES
    ):
        self.encoder, self.length, self.dtype = encoder, length, dtype
        self.encoded = 0
        self._free = memory_bytes
        # Least recently used first.
        self._known: collections.OrderedDict[str, Embedded] = collections.OrderedDict()

    def embed(self, captions: list[str]) -> list[Embedded]:
        """One result per caption, in their order."""
        results = {c: self._known[c] for c in captions if c in self._known}
        new = [c for c in dict.fromkeys(captions) if c not in results]
        if new:
            rows = self.encoder.encode(new, self.length)
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
        tokens = min(len(self.encoder.tokenize(caption)), self.length)
        return tokens * embeddings.row_bytes(self.encoder.dim, self.dtype)

    def _store(self, caption: str, row: np.ndarray) -> Embedded:
        data = embeddings.to_bytes(row, self.dtype)
        stored = embeddings.from_bytes(data, self.encoder.dim, self.dtype)
        cut = len(self.encoder.tokenize(caption)) > self.length
        return Embedded(data, len(row), cut, embeddings.cosine_error(row, stored))
