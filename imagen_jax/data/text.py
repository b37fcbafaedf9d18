"""Frozen text encoders.

An encoder has

  identity: "NAME@VERSION"; equal identities mean equal embeddings. Manifests and
    checkpoints carry it, and `load_encoder` accepts it.
  dim: width of one token's embedding.
  tokenize(caption) -> list[int]: all of the caption's tokens, the end included.
  encode(captions, length) -> list of `[n_i, dim]` bfloat16, n_i <= length.
"""

import dataclasses
import functools
import math
import re
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from imagen_jax.batch import pad_text
from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.models.t5 import BUCKETS, T5Config, T5Encoder

_PAD, _END = 0, 1
# Captions in one call of the compiled encoder, and the lengths it is compiled for.
_ROWS = 64
_LENGTHS = (16, 32, 64, 128)
_TINY = T5Config(
    vocab_size=32_768,
    num_layers=2,
    d_model=64,
    d_ff=128,
    d_kv=16,
    num_heads=4,
    dtype="float32",
)
_ADDED = 0.3


@dataclasses.dataclass(frozen=True)
class TinyEncoder:
    """A small T5 with fixed random weights: no files, no training.

    It has learnt nothing. Words are told apart and their order shows in the
    embeddings, which is enough to train a small model on a small world of captions;
    it does not know that "crimson" is near "red". Pretrained weights come through
    the same door, `load_encoder`.

    The weights are drawn as T5 initialises them, with two exceptions. The position
    bias is set so that three heads look at the word before, the word after and the one
    two before, and the last at all words. What a layer adds is scaled by `_ADDED`: in a
    random network of full strength a word's embedding depends on its neighbours so
    much that words do not carry over to new combinations (benchmarks/README.md).
    """

    identity: str = "tiny@v2-seed0-2x64"
    dim: int = _TINY.d_model

    def tokenize(self, caption: str) -> list[int]:
        """Words and punctuation marks, lower-cased and hashed; then the end."""
        words = re.findall(r"\w+|[^\w\s]", caption.lower())
        free = _TINY.vocab_size - 2
        return [2 + zlib.crc32(word.encode()) % free for word in words] + [_END]

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """Embeds captions; what is longer than `length` tokens loses its tail.

        An embedding depends on its own caption only: neither on the other captions
        nor on their number.

        Returns:
          one `[n_i, dim]` bfloat16 per caption, `1 <= n_i <= length`.
        """
        tokens = {caption: _cut(self.tokenize(caption), length) for caption in captions}
        rows = {}
        params = _tiny_params()
        for padded in sorted({_padded_length(len(t)) for t in tokens.values()}):
            group = [c for c, t in tokens.items() if _padded_length(len(t)) == padded]
            for start in range(0, len(group), _ROWS):
                chunk = group[start : start + _ROWS]
                ids = np.full((_ROWS, padded), _PAD, np.int32)
                for i, caption in enumerate(chunk):
                    ids[i, : len(tokens[caption])] = tokens[caption]
                out = np.asarray(_tiny_apply(params, ids))
                for i, caption in enumerate(chunk):
                    rows[caption] = out[i, : len(tokens[caption])]
        return [rows[caption].astype(ml_dtypes.bfloat16) for caption in captions]


def _cut(tokens: list[int], length: int) -> list[int]:
    # The end stays: the encoder has a token for it, as T5's own truncation does.
    return tokens if len(tokens) <= length else tokens[: length - 1] + [_END]


def _padded_length(n: int) -> int:
    longest = _LENGTHS[-1]
    steps = (*_LENGTHS, math.ceil(n / longest) * longest)
    return next(step for step in steps if n <= step)


@jax.jit
def _tiny_apply(params, ids):
    # A TPU multiplies float32 in bfloat16 passes unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return T5Encoder(_TINY).apply({"params": params}, ids, ids != _PAD)


@functools.cache
def _tiny_params():
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    shapes = jax.eval_shape(T5Encoder(_TINY).init, jax.random.key(0), ids, mask)
    # numpy's frozen generator: jax's bits depend on its version and its flags.
    random = np.random.RandomState(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "scale":
            return np.ones(shape, np.float32)
        if name == "relative_bias":
            return _neighbour_bias(*shape)
        stddev = {
            "token_embedding": 1.0,
            "query": (shape[0] * shape[-1]) ** -0.5,
            "key": shape[0] ** -0.5,
            "value": shape[0] ** -0.5,
            "out": _ADDED * math.prod(shape[:-1]) ** -0.5,
        }.get(name, math.prod(shape[:-1]) ** -0.5)
        return (stddev * random.standard_normal(shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes)["params"])


def _neighbour_bias(buckets: int, heads: int) -> np.ndarray:
    # e**6 = 400 to 1 against any other token of equal content. Small distances have
    # a bucket each: d to the left is bucket d, d to the right is BUCKETS / 2 + d.
    bias = np.zeros((buckets, heads), np.float32)
    for head, bucket in enumerate((1, BUCKETS // 2 + 1, 2)):
        bias[bucket, head] = 6.0
    return bias


# "hf:NAME" and "t5x:PATH" take their argument after the colon.
ENCODERS = {"tiny": TinyEncoder}


def load_encoder(name: str, weights: str = "") -> TinyEncoder:
    """The encoder called `name`.

    Args:
      name: a key of `ENCODERS`, or the identity that a manifest or a checkpoint
        carries.
      weights: file or folder of the encoder's weights; "tiny" has none.

    Raises:
      UserError: for an unknown name, and for an identity of another version.
    """
    kind = name.partition("@")[0]
    if kind not in ENCODERS:
        raise UserError(
            f"there is no text encoder {name!r}{did_you_mean(kind, ENCODERS)}; "
            f"there is: {', '.join(ENCODERS)}"
        )
    if weights:
        raise UserError(
            f"the encoder {kind!r} has built-in weights; leave out the weights "
            f"{weights!r}"
        )
    encoder = ENCODERS[kind]()
    if "@" in name and name != encoder.identity:
        raise UserError(
            f"the text encoder {name!r} was asked for; this version of the program "
            f"has {encoder.identity!r}, whose embeddings differ"
        )
    return encoder


def embed(encoder: TinyEncoder, captions: list[str], length: int):
    """Padded embeddings of captions, as a batch or a sampler takes them.

    Returns:
      `text` `[B, length, dim]` bfloat16 and `mask` `[B, length]` bool.
    """
    return pad_text(encoder.encode(captions, length), length, encoder.dim)
