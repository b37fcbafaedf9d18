"""The text half of `prepare`: captions to the bytes of their embeddings."""

import collections
import dataclasses

import numpy as np

from imagen_jax.text import embeddings

# What embeddings of earlier captions may take: of T5-XXL in bfloat16 6,500 captions of
# 20 tokens, enough for those that come again and again.
_MEMORY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A caption's embedding as it is stored.

    Attributes:
      data: `embeddings.to_bytes` of its tokens.
      tokens: how many are stored.
      cut: whether the caption has more.
      errors: `[tokens]` float64, cosine error of each against what the encoder gave.
    """

    data: bytes
    tokens: int
    cut: bool
    errors: np.ndarray


class Embedder:
    """Embeds captions, equal ones once as long as they are remembered.

    What was used last is remembered, within a bounded memory. Results do not depend
    on what is: an encoder embeds each caption by itself.

    Attributes:
      encoder: as `imagen_jax.text.encoders` describes it.
      encoded: captions that went through it.
      dtype: in which results are stored.
    """

    def __init__(
        self, encoder, length: int, dtype: str, memory_bytes: int = _MEMORY_BYTES
    ):
        """
        Args:
          encoder: as `imagen_jax.text.encoders` describes it.
          length: tokens of a caption that are kept.
          dtype: one of `embeddings.DTYPES`.
          memory_bytes: of the embeddings that are remembered.
        """
        self.encoder = encoder
        self.encoded = 0
        self._length = length
        self.dtype = dtype
        self._known = collections.OrderedDict()
        self._free = memory_bytes

    def embed(self, captions: list[str]) -> list[Embedded]:
        """One result per caption, in their order."""
        new = [c for c in dict.fromkeys(captions) if c not in self._known]
        results = {c: self._known[c] for c in captions if c in self._known}
        if new:
            rows = self.encoder.encode(new, self._length)
            results |= {c: self._store(c, row) for c, row in zip(new, rows)}
            self.encoded += len(new)
        for caption, result in results.items():
            self._remember(caption, result)
        return [results[caption] for caption in captions]

    def expected_bytes(self, caption: str) -> int:
        """Of a caption's embedding, which is not made."""
        tokens = min(len(self.encoder.tokenize(caption)), self._length)
        return tokens * embeddings.row_bytes(self.encoder.dim, self.dtype)

    def _store(self, caption, row) -> Embedded:
        data = embeddings.to_bytes(row, self.dtype)
        stored = embeddings.from_bytes(data, self.encoder.dim, self.dtype)
        return Embedded(
            data,
            len(row),
            len(self.encoder.tokenize(caption)) > self._length,
            embeddings.cosine_error(row, stored),
        )

    def _remember(self, caption, result) -> None:
        if caption in self._known:
            self._known.move_to_end(caption)
            return
        self._known[caption] = result
        self._free -= len(result.data)
        while self._free < 0:
            _, oldest = self._known.popitem(last=False)
            self._free += len(oldest.data)
