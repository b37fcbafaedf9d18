import numpy as np

from imagen_jax.preparing.captions import Embedder
from imagen_jax.text import embeddings
from imagen_jax.text import encoders as text


class _Counting:
    """The tiny encoder; notes what it is asked to encode."""

    def __init__(self):
        self._tiny = text.load_encoder("tiny")
        self.dim, self.tokenize = self._tiny.dim, self._tiny.tokenize
        self.seen = []

    def encode(self, captions, length):
        self.seen += captions
        return self._tiny.encode(captions, length)


def test_equal_captions_are_encoded_once():
    encoder = _Counting()
    embedder = Embedder(encoder, 8, "bfloat16")
    first = embedder.embed(["a ring", "a cross", "a ring"])
    second = embedder.embed(["a cross", "a disc", "a ring"])
    assert encoder.seen == ["a ring", "a cross", "a disc"]
    assert first[0] == first[2] == second[2] and first[1] == second[0]
    want = text.load_encoder("tiny").encode(["a disc"], 8)[0]
    np.testing.assert_array_equal(embeddings.from_bytes(second[1].data, 64), want)


def test_the_memory_is_bounded():
    encoder = _Counting()
    # "a ring" and the end are 3 tokens of 2 * 64 bytes.
    embedder = Embedder(encoder, 8, "bfloat16", memory_bytes=2 * 3 * 128)
    for caption in ("a ring", "a cross", "a ring", "a disc", "a ring"):
        embedder.embed([caption])
    assert encoder.seen == ["a ring", "a cross", "a disc", "a ring"]
    # More at a time than there is memory for.
    many = [f"a ring {i}" for i in range(9)]
    assert len(embedder.embed(many)) == 9


def test_tokens_and_errors():
    for dtype in embeddings.DTYPES:
        embedder = Embedder(text.load_encoder("tiny"), 4, dtype)
        short, long = embedder.embed(["ring", "a small red ring"])
        assert (short.tokens, short.cut) == (2, False)
        assert (long.tokens, long.cut) == (4, True)
        for result in (short, long):
            row_bytes = embeddings.row_bytes(64, dtype)
            assert len(result.data) == result.tokens * row_bytes
            assert result.errors.shape == (result.tokens,)
        # Of int8: at most half a step of 1/127 of the largest value, in each of 64.
        bound = 0 if dtype == "bfloat16" else 64 * (0.5 / 127 + 2**-8) ** 2
        assert long.errors.max() <= bound
        assert (long.errors.max() > 0) == (dtype == "int8")
