"""Frozen text encoders by name."""

import re
from typing import Protocol

import numpy as np

from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.models.t5 import SIZES
from imagen_jax.stores import check_disk
from imagen_jax.text.t5 import PretrainedT5
from imagen_jax.text.tiny import TinyEncoder


class TextEncoder(Protocol):
    """What `load_encoder` returns."""

    # "NAME@VERSION"; equal identities mean equal embeddings. Manifests and checkpoints
    # carry it, and `load_encoder` accepts it.
    identity: str
    dim: int  # width D of one token's embedding
    nbytes: int  # what its weights take on a device

    def tokenize(self, caption: str) -> list[int]:
        """All tokens of the caption, the end token included."""

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """`[n_i, D]` bfloat16 for each caption, `1 <= n_i <= length`.

        A caption that is longer loses its tail. An embedding depends on its own
        caption only, neither on the other captions nor on their number.
        """


_FORMS = ("tiny", *SIZES, "hf:NAME_OR_PATH", "t5x:CHECKPOINT")
# "NAME@v2-..." for the tiny encoder, "NAME@DTYPE-HASH" for all others.
_IDENTITY = re.compile(r"(.+)@((?:v\d|bfloat16-|float32-)[\w-]*)")


def load_encoder(name: str, weights: str = "", dtype: str = "") -> TextEncoder:
    """The encoder called `name`, with its weights on this process's devices.

    Args:
      name: "tiny"; "t5_1_1_SIZE" or "t5_1_0_SIZE", a key of `models.t5.SIZES`;
        "hf:NAME_OR_PATH", a model that transformers loads; "t5x:CHECKPOINT", T5X's
        own network; or the identity in a manifest or a checkpoint.
      weights: file or folder with the encoder's weights. "tiny" has none; for "hf:" and
        "t5x:" it replaces what follows the colon.
      dtype: compute type of a T5, "bfloat16" (default) or "float32". An identity
        brings its own.
    """
    check_disk(weights)
    match = _IDENTITY.fullmatch(name)
    asked, version = match.groups() if match else (name, "")
    kind, _, argument = asked.partition(":")
    if version and not version.startswith("v"):
        dtype = version.partition("-")[0]
    if asked == "tiny":
        if weights or dtype not in ("", "float32"):
            raise UserError(
                "the encoder 'tiny' has built-in weights in float32; leave out "
                f"{weights or dtype!r}"
            )
        encoder = TinyEncoder()
    elif asked in SIZES:
        encoder = PretrainedT5(asked, weights, dtype or "bfloat16")
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
            f"the text encoder {name!r} was asked for; here is {encoder.identity!r}, "
            "whose embeddings differ: give its weights"
        )
    return encoder
