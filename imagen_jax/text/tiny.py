"""A small T5 with fixed random weights, for small worlds of captions."""

import dataclasses
import functools
import math
import re
import zlib

import flax.linen as nn
import jax
import numpy as np

from imagen_jax.models.t5 import BUCKETS, END, T5Config, T5Encoder, abstract_params
from imagen_jax.text.embeddings import encode_groups

_CONFIG = T5Config(
    vocab_size=32_768,
    num_layers=2,
    d_model=64,
    d_ff=128,
    d_kv=16,
    num_heads=4,
    dtype="float32",
)
_LAYER_SCALE = 0.3


@dataclasses.dataclass(frozen=True)
class TinyEncoder:
    """A small T5 with fixed random weights: no files, no training.

    It tells words apart and their order shows in the embeddings, which is enough for a
    small world of captions; it does not know that "crimson" is near "red".

    The weights are drawn as T5 initialises them, with two exceptions. The position
    bias makes three heads look at the word before, the word after and the one two
    before, and the last head at all words. The output of each layer is scaled by
    `_LAYER_SCALE`, so that a word's embedding depends little on its neighbours and
    words carry over to new combinations (benchmarks/README.md).
    """

    identity: str = "tiny@v2-seed0-2x64"
    dim: int = _CONFIG.d_model
    nbytes: int = 0  # some millions: nothing that must make room

    def tokenize(self, caption: str) -> list[int]:
        """Words and punctuation marks, lower-cased and hashed; then the end."""
        words = re.findall(r"\w+|[^\w\s]", caption.lower())
        free = _CONFIG.vocab_size - 2
        return [2 + zlib.crc32(word.encode()) % free for word in words] + [END]

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """See `encoders.TextEncoder`."""
        tokens = [self.tokenize(caption) for caption in captions]
        return encode_groups(tokens, length, functools.partial(_apply, _params()))


@jax.jit
def _apply(params, ids, mask):
    # A TPU multiplies float32 in bfloat16 passes unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return T5Encoder(_CONFIG).apply({"params": params}, ids, mask)


@functools.cache
def _params():
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
            "out": _LAYER_SCALE * math.prod(shape[:-1]) ** -0.5,
        }.get(name, math.prod(shape[:-1]) ** -0.5)
        return (stddev * random.standard_normal(shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, nn.unbox(abstract_params(_CONFIG)))


def _neighbour_bias(buckets: int, heads: int) -> np.ndarray:
    # e**6 = 400 to 1 against any other token of equal content. Small distances have
    # a bucket each: d to the left is bucket d, d to the right is BUCKETS / 2 + d.
    bias = np.zeros((buckets, heads), np.float32)
    for head, bucket in enumerate((1, BUCKETS // 2 + 1, 2)):
        bias[bucket, head] = 6.0
    return bias
