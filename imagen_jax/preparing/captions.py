"""Captions to the bytes of their embeddings."""

import dataclasses

import numpy as np

from imagen_jax.text import embeddings


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A caption's embedding as it is stored."""

    data: bytes  # `embeddings.to_bytes` of its tokens
    tokens: int  # number of tokens that are stored
    cut: bool  # whether the caption has more
    errors: np.ndarray  # [tokens] float64, cosine errors against the encoder's output


class Embedder:
    """Embeds captions; equal ones once, while `memory_bytes` hold their results.

    Results do not depend on it: an encoder embeds each caption by itself.
    """

    def __init__(self, encoder, length: int, dtype: str, memory_bytes: int = 2**30):
        self.encoder, self.length, self.dtype = encoder, length, dtype
        self._memory_bytes = self._free = memory_bytes
        self._known: dict[str, Embedded] = {}

    def embed(self, captions: list[str]) -> list[Embedded]:
        """One result per caption, in their order."""
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
        data = embeddings.to_bytes(row, self.dtype)
        stored = embeddings.from_bytes(data, self.encoder.dim, self.dtype)
        cut = len(self.encoder.tokenize(caption)) > self.length
        return Embedded(data, len(row), cut, embeddings.cosine_error(row, stored))
