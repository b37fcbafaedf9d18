import hashlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.text import embeddings
from imagen_jax.text import tiny as tiny_encoder

ENCODER = tiny_encoder.TinyEncoder()


def _encode(*captions, length=128):
    return [x.astype(np.float32) for x in ENCODER.encode(list(captions), length)]


def test_weights_are_what_the_identity_says():
    """Drawn by numpy's frozen generator: the same bits on every machine."""
    leaves = jax.tree_util.tree_leaves_with_path(tiny_encoder._params())
    digest = hashlib.sha256()
    for path, leaf in leaves:
        digest.update(jax.tree_util.keystr(path).encode() + leaf.tobytes())
    assert ENCODER.identity == "tiny@v2-seed0-2x64"
    assert digest.hexdigest()[:16] == "27258486eba51061"


def test_every_token_tells_its_word_and_its_neighbours():
    """Swapping the colours changes every token, not the colours' own only."""
    a, b = _encode(
        "a red circle above a blue square", "a blue circle above a red square"
    )
    # Tokens have norm sqrt(D); two unrelated ones differ by sqrt(2) of that.
    change = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
    # A layer adds some 0.3 of a token, a part of it from the word beside it.
    assert change.min() > 0.1
    assert change[1] > 0.8 and change[5] > 0.8


def test_a_noun_tells_the_colour_before_it():
    """Whatever else the caption says: the nearest centroid names the colour."""
    colours, nouns = ("red", "blue", "green"), ("circle", "square", "ring")
    captions = {
        (colour, noun, other): f"a {colour} {noun} above a {other} cross"
        for colour in colours
        for noun in nouns
        for other in colours
    }
    tokens = dict(zip(captions, [row[2] for row in _encode(*captions.values())]))
    for key, token in tokens.items():
        centroid = {
            colour: np.mean(
                [
                    t
                    for k, t in tokens.items()
                    if k != key and k[:2] == (colour, key[1])
                ],
                axis=0,
            )
            for colour in colours
        }
        nearest = min(colours, key=lambda c: np.linalg.norm(token - centroid[c]))
        assert nearest == key[0], key


def test_an_embedding_is_of_its_own_caption_only():
    caption = "two small yellow rings"
    alone = _encode(caption)[0]
    others = [f"{'very ' * (i % 40)}other {i}" for i in range(150)]
    among = _encode(*others[:75], caption, *others[75:], caption)
    # One unit of bfloat16: a matmul may add in another order for another row.
    for row in (among[75], among[-1]):
        np.testing.assert_allclose(row, alone, rtol=2**-7, atol=2**-10)


def test_padding_changes_nothing(monkeypatch):
    caption = "a red circle"
    short = _encode(caption)[0]
    monkeypatch.setattr(embeddings, "_LENGTHS", (64,))
    np.testing.assert_allclose(_encode(caption)[0], short, rtol=2**-7, atol=2**-10)


@pytest.mark.slow
def test_processes_agree():
    program = (
        "from imagen_jax.text.tiny import TinyEncoder;"
        "print(TinyEncoder().encode(['A red circle.', ''], 9)[0].tobytes().hex())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # Hashing must not depend on Python's per-process seed of hash().
    assert out.stdout.strip() == ENCODER.encode(["A red circle."], 9)[0].tobytes().hex()


def test_tokenize():
    tokens = ENCODER.tokenize("A red, RED circle")
    assert len(tokens) == 6 and tokens[1] == tokens[3] and tokens[-1] == 1
    assert len(set(tokens)) == 5 and min(tokens[:-1]) >= 2
    assert ENCODER.tokenize("") == [1]
    assert len(ENCODER.tokenize("猫 and 犬!")) == 5


@pytest.mark.slow
def test_long_captions_lose_their_tail_not_their_end():
    row = _encode("one two three four five", length=4)[0]
    np.testing.assert_allclose(
        row, _encode("one two three")[0], rtol=2**-7, atol=2**-10
    )
    assert len(_encode("word " * 300, length=400)[0]) == 301
