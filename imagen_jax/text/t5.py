"""Pretrained T5: captions to embeddings on this process's devices."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.models.t5 import END, PAD, SIZES, T5Config, T5Encoder
from imagen_jax.sharding import batch_sharding, make_mesh, on_mesh, row_shards
from imagen_jax.text.embeddings import ROWS, encode_groups
from imagen_jax.text.t5_checkpoints import existing
from imagen_jax.text.t5_weights import load_params

# Hugging Face's name and that in gs://t5-data/vocabs.
_VOCABULARIES = ("spiece.model", "sentencepiece.model")
# The table has a row for each piece, for up to 100 sentinels, and is then padded to a
# multiple of 128: 32,000 pieces make 32,128 rows, mT5's 250,000 make 250,112.
_MORE_ROWS = 100 + 127


class PretrainedT5:
    """A T5 encoder of any size with published weights.

    Attributes:
      identity: "NAME@DTYPE-HASH"; the hash covers the weights' numbers and the
        vocabulary.
      dim: width of one token's embedding.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        dtype: str = "bfloat16",
        mesh: Mesh | None = None,
        config: T5Config | None = None,
        network: Callable | None = None,
    ):
        """Reads the weights; see `t5_weights.load_params`.

        Args:
          name: a key of `models.t5.SIZES`, or any other start of the identity.
          weights: a checkpoint, with a SentencePiece model beside it.
          dtype: "bfloat16" or "float32".
          mesh: devices of this process; by default all of them on one fsdp axis: each
            holds a part of the weights and embeds a part of the captions.
          config: sizes, when `name` is no key.
          network: `(config, params, ids, mask) -> [B, L, D]`; ours by default.

        Raises:
          UserError: when weights or vocabulary are missing or do not fit the size.
        """
        if not weights:
            raise UserError(
                f"the encoder {name!r} needs its weights: give "
                "--encoder_weights=FOLDER (docs/text_encoders.md tells where they are)"
            )
        self._config = dataclasses.replace(config or SIZES[name], dtype=dtype)
        # Not jax.devices(): processes of a pod embed captions of their own.
        self._mesh = mesh or make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
        self._vocabulary, content = _open_vocabulary(weights, self._config)
        self._params, numbers = load_params(weights, self._config, self._mesh)
        content = numbers.encode() + hashlib.sha256(content).digest()
        self.identity = f"{name}@{dtype}-{hashlib.sha256(content).hexdigest()[:12]}"
        self.dim = self._config.d_model
        self._run = jax.jit(
            on_mesh(functools.partial(network or run_t5, self._config), self._mesh)
        )

    def tokenize(self, caption: str) -> list[int]:
        """Pieces of the SentencePiece model, then the end."""
        return [*self._vocabulary.encode(caption), END]

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """See `encoders.TextEncoder`."""
        tokens = [self.tokenize(caption) for caption in captions]
        shards = row_shards(self._mesh)
        return encode_groups(tokens, length, self._embed, -(-ROWS // shards) * shards)

    def _embed(self, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        ids, mask = jax.device_put((ids, mask), batch_sharding(self._mesh))
        return self._run(self._params, ids, mask)


def run_t5(config: T5Config, params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Applies `T5Encoder`: `[B, L]` ids and mask to `[B, L, D]`."""
    # A TPU multiplies float32 in bfloat16 passes unless told otherwise.
    precision = "highest" if config.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        return T5Encoder(config).apply({"params": params}, ids, mask)


def _open_vocabulary(weights: str, config: T5Config):
    """The SentencePiece model beside the weights, and the bytes of its file."""
    import sentencepiece

    place = existing(weights)
    folder = place if place.is_dir() else place.parent
    # T5X has one model for all checkpoints of a run, in the folder above them.
    paths = [f / n for f in (folder, folder.parent) for n in _VOCABULARIES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            f"there is no {' or '.join(_VOCABULARIES)} beside the weights {weights!r}: "
            "copy the vocabulary there (docs/text_encoders.md tells from where)"
        )
    content = path.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(
            f"{str(path)!r} is no SentencePiece model, or is damaged ({error}): copy "
            "it again"
        ) from None
    if (ids := (model.pad_id(), model.eos_id())) != (PAD, END):
        raise UserError(
            f"{str(path)!r} has pad and end at {ids}, T5's has them at {(PAD, END)}: "
            "it is another model's vocabulary"
        )
    pieces, rows = model.get_piece_size(), config.vocab_size
    if not pieces <= rows <= pieces + _MORE_ROWS:
        raise UserError(
            f"{str(path)!r} has {pieces} pieces; the token embedding of shape "
            f"{(rows, config.d_model)} is for {max(1, rows - _MORE_ROWS)} to {rows} of "
            "them: it is another model's vocabulary"
        )
    return model, content
