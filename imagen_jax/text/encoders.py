"""Frozen text encoders.

An encoder has

  identity: "NAME@VERSION"; equal identities mean equal embeddings. Manifests and
    checkpoints carry it, and `load_encoder` accepts it.
  dim: width of one token's embedding.
  tokenize(caption) -> list[int]: all of the caption's tokens, the end included.
  encode(captions, length) -> list of `[n_i, dim]` bfloat16, n_i <= length.
"""

import re
from typing import Protocol

import numpy as np

from imagen_jax.batch import pad_text
from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.models.t5 import SIZES
from imagen_jax.text.t5 import PretrainedT5
from imagen_jax.text.tiny import TinyEncoder


class TextEncoder(Protocol):
    """What `load_encoder` returns; see above."""

    identity: str
    dim: int

    def tokenize(self, caption: str) -> list[int]:
        """All of the caption's tokens, the end included."""

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """Of each caption `[n_i, dim]` bfloat16, `1 <= n_i <= length`."""


_FORMS = ("tiny", *SIZES, "hf:NAME_OR_PATH", "t5x:CHECKPOINT")
# What follows a name in an identity: of "tiny" its version, of others the type that
# they compute in and the hash of their weights.
_IDENTITY = re.compile(r"(.+)@((?:v\d|bfloat16-|float32-)[\w-]*)")


def load_encoder(name: str, weights: str = "", dtype: str = "") -> TextEncoder:
    """The encoder called `name`, with its weights on this process's devices.

    Args:
      name: "tiny"; "t5_1_1_SIZE" or "t5_1_0_SIZE", a key of `models.t5.SIZES`;
        "hf:NAME_OR_PATH" of what transformers loads; "t5x:CHECKPOINT" for T5X's own
        network; or the identity that a manifest or a checkpoint carries.
      weights: file or folder of the encoder's weights. "tiny" has none; for "hf:" and
        "t5x:" it takes the place of what follows the colon.
      dtype: "bfloat16" (default) or "float32", of a T5's computation. An identity
        brings its own.

    Raises:
      UserError: for an unknown name, weights that do not fit it, and an identity
        whose weights, tokens or version are others.
    """
    match = _IDENTITY.fullmatch(name)
    asked, version = match.groups() if match else (name, "")
    kind, _, argument = asked.partition(":")
    if version and not version.startswith("v"):
        dtype = version.partition("-")[0]
    if kind == "tiny" and not argument:
        encoder = _tiny(weights, dtype)
    elif kind in SIZES and not argument:
        encoder = PretrainedT5(kind, weights, dtype or "bfloat16")
    elif kind == "hf" and (argument or weights):
        from imagen_jax.text.huggingface import TransformersEncoder

        encoder = TransformersEncoder(argument, weights, dtype or "float32")
    elif kind == "t5x" and (argument or weights):
        from imagen_jax.text.t5x import load_t5x

        encoder = load_t5x(weights or argument, dtype or "bfloat16")
    else:
        raise UserError(
            f"there is no text encoder {name!r}{did_you_mean(asked, _FORMS)}; there "
            f"is: {', '.join(_FORMS)}"
        )
    if version and name != encoder.identity:
        raise UserError(
            f"the text encoder {name!r} was asked for; "
            + (f"the weights {weights!r} make" if weights else "here is")
            + f" {encoder.identity!r}, whose embeddings differ"
        )
    return encoder


def _tiny(weights: str, dtype: str) -> TinyEncoder:
    if weights:
        raise UserError(
            "the encoder 'tiny' has built-in weights; leave out the weights "
            f"{weights!r}"
        )
    if dtype not in ("", "float32"):
        raise UserError(f"the encoder 'tiny' runs in float32 only, not in {dtype!r}")
    return TinyEncoder()


def embed(encoder: TextEncoder, captions: list[str], length: int):
    """Padded embeddings of captions, as a batch or a sampler takes them.

    Returns:
      `text` `[B, length, dim]` bfloat16 and `mask` `[B, length]` bool.
    """
    return pad_text(encoder.encode(captions, length), length, encoder.dim)
