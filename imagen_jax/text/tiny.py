"""A small T5 with fixed random weights, for small worlds of captions."""

import dataclasses
import functools
import math
import re
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.models.t5 import BUCKETS, T5Config, T5Encoder
from imagen_jax.text.caption_groups import END, cut, encode_groups

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
        return [2 + zlib.crc32(word.encode()) % free for word in words] + [END]

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """Embeds captions; what is longer than `length` tokens loses its tail.

        An embedding depends on its own caption only: neither on the other captions
        nor on their number.

        Returns:
          one `[n_i, dim]` bfloat16 per caption, `1 <= n_i <= length`.
        """
        params = _tiny_params()
        tokens = [cut(self.tokenize(caption), length) for caption in captions]
        return encode_groups(tokens, functools.partial(_tiny_apply, params))


@jax.jit
def _tiny_apply(params, ids, mask):
    # A TPU multiplies float32 in bfloat16 passes unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return T5Encoder(_TINY).apply({"params": params}, ids, mask)


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
