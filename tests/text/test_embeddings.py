import types

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.text import embeddings
from imagen_jax.text import encoders as text


def test_captions_come_back_in_their_order_without_padding():
    shapes = []

    def run(ids, mask):
        shapes.append(ids.shape)
        assert not ids[~mask].any()
        # Each token's embedding holds its id and the number of tokens.
        return np.stack([ids, np.broadcast_to(mask.sum(1)[:, None], ids.shape)], -1)

    tokens = [[5, 1], [7] * 16 + [1], [0, 1], [5, 1], [9] * 200 + [1]]
    rows = embeddings.encode_groups(tokens, 400, run, rows=2)
    for caption, row in zip(tokens, rows, strict=True):
        assert row.dtype == "bfloat16"
        np.testing.assert_array_equal(row[:, 0].astype(int), caption)
        assert (row[:, 1] == len(caption)).all()
    # [5, 1] once only; a group for each padded length.
    assert shapes == [(2, 16), (2, 32), (2, 256)]


@pytest.mark.parametrize(
    ("caption", "length", "kept"),
    [([4, 5, 6, 1], 4, [4, 5, 6, 1]), ([4, 5, 6, 1], 3, [4, 5, 1]), ([4, 1], 1, [1])],
)
def test_a_caption_that_is_cut_keeps_its_end(caption, length, kept):
    def run(ids, mask):
        return ids[..., None]

    (row,) = embeddings.encode_groups([caption], length, run)
    assert row[:, 0].astype(int).tolist() == kept


def _rows(n=7, dim=48):
    rows = (
        np.random.default_rng(0).normal(size=(n, dim))
        * 10.0 ** np.arange(-3, n - 3)[:, None]
    )
    return rows.astype(ml_dtypes.bfloat16)


def test_bytes_are_little_endian_bfloat16():
    row = np.array([[1.0, -2.0], [0.5, 3.0]], ml_dtypes.bfloat16)
    # 1.0 is 0x3f80: the upper half of a float32.
    assert embeddings.to_bytes(row)[:4] == b"\x80\x3f\x00\xc0"
    np.testing.assert_array_equal(
        embeddings.from_bytes(embeddings.to_bytes(row), 2), row
    )


def test_bytes_of_int8():
    row = np.array([[254.0, -2.0, 127.0]])
    data = embeddings.to_bytes(row, "int8")
    # The scale 2.0 as a float32 is 0x40000000; then 127, -1, and 63.5 to the even 64.
    assert data == b"\x00\x00\x00\x40" + bytes([127, 255, 64])
    assert embeddings.from_bytes(data, 3, "int8").tolist() == [[254.0, -2.0, 128.0]]


@pytest.mark.parametrize("dtype", embeddings.DTYPES)
def test_round_trip(dtype):
    rows = _rows()
    data = embeddings.to_bytes(rows, dtype)
    assert len(data) == len(rows) * embeddings.row_bytes(48, dtype)
    back = embeddings.from_bytes(data, 48, dtype)
    assert back.shape == rows.shape and back.dtype == ml_dtypes.bfloat16
    if dtype == "bfloat16":
        np.testing.assert_array_equal(back, rows)
        return
    want = rows.astype(float)
    largest = np.abs(want).max(1, keepdims=True)
    # Half a step of 1/127 of the largest, then bfloat16's half step of 2**-8.
    bound = largest / 254 * (1 + 2**-8) + np.abs(want) * 2**-8
    assert (np.abs(back.astype(float) - want) <= bound).all()


def test_rows_of_zeros():
    zeros = np.zeros((2, 5), ml_dtypes.bfloat16)
    back = embeddings.from_bytes(embeddings.to_bytes(zeros, "int8"), 5, "int8")
    assert not back.any() and not embeddings.cosine_error(zeros, back).any()


def test_cosine_error():
    a = np.array([[1.0, 0.0], [1.0, 1.0], [3.0, 4.0]])
    b = np.array([[0.0, 1.0], [1.0, 0.0], [6.0, 8.0]])
    np.testing.assert_allclose(
        embeddings.cosine_error(a, b), [1, 1 - 0.5**0.5, 0], atol=1e-15
    )


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
    embedder = embeddings.Embedder(encoder, 8, "bfloat16")
    first = embedder.embed(["a ring", "a cross", "a ring"])
    second = embedder.embed(["a cross", "a disc", "a ring"])
    assert encoder.seen == ["a ring", "a cross", "a disc"]
    assert first[0] == first[2] == second[2] and first[1] == second[0]
    want = text.load_encoder("tiny").encode(["a disc"], 8)[0]
    np.testing.assert_array_equal(embeddings.from_bytes(second[1].data, 64), want)


@pytest.mark.parametrize("dtype", embeddings.DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_no_numbers_are_refused(dtype, value):
    encoder = text.load_encoder("tiny")
    rows = encoder.encode(["a ring"], 8)
    rows[0][1, 5] = value
    broken = types.SimpleNamespace(
        dim=encoder.dim,
        identity="hf:broken@1",
        tokenize=encoder.tokenize,
        encode=lambda captions, length: rows,
    )
    embedder = embeddings.Embedder(broken, 8, dtype)
    with pytest.raises(UserError, match="'hf:broken@1' answers 'a ring' with a number"):
        embedder.embed(["a ring"])


def test_the_memory_is_bounded():
    encoder = _Counting()
    # "a ring" and the end are 3 tokens of 2 * 64 bytes.
    embedder = embeddings.Embedder(encoder, 8, "bfloat16", memory_bytes=2 * 3 * 128)
    for caption in ("a ring", "a cross", "a ring", "a disc", "a ring"):
        embedder.embed([caption])
    assert encoder.seen == ["a ring", "a cross", "a disc", "a ring"]
    # More at a time than there is memory for.
    many = [f"a ring {i}" for i in range(9)]
    assert len(embedder.embed(many)) == 9


def test_tokens_and_errors():
    for dtype in embeddings.DTYPES:
        embedder = embeddings.Embedder(text.load_encoder("tiny"), 4, dtype)
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
