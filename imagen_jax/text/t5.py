"""Pretrained T5: captions to embeddings on this process's devices."""

import dataclasses
import hashlib
from collections.abc import Callable

import jax
import numpy as np

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
# multiple of 128.
_MORE_ROWS = 100 + 127


def run_t5(config: T5Config, params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Applies `T5Encoder`: `[B, L]` ids and mask to `[B, L, D]`."""
    return T5Encoder(config).apply({"params": params}, ids, mask)


class PretrainedT5:
    """A T5 encoder of any size with published weights.

    The hash in its identity "NAME@DTYPE-HASH" covers the weights' numbers and the
    vocabulary.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        dtype: str = "bfloat16",
        config: T5Config | None = None,
        network: Callable = run_t5,
    ):
        """Reads the weights; see `t5_weights.load_params`.

        Args:
          name: a key of `models.t5.SIZES`, or any other start of the identity.
          weights: a checkpoint, with a SentencePiece model beside it.
          dtype: "bfloat16" or "float32".
          config: sizes, when `name` is no key.
          network: `(config, params, ids, mask) -> [B, L, D]`.
        """
        if not weights:
            raise UserError(
                f"the encoder {name!r} needs its weights: give "
                "--encoder_weights=FOLDER (docs/text_encoders.md tells where they are)"
            )
        config = dataclasses.replace(config or SIZES[name], dtype=dtype)
        # Each device holds a part of the weights and embeds a part of the captions. Not
        # jax.devices(): processes of a pod embed captions of their own.
        self._mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
        self._vocabulary, content = _open_vocabulary(weights, config)
        self._params, numbers = load_params(weights, config, self._mesh)
        content = numbers.encode() + hashlib.sha256(content).digest()
        self.identity = f"{name}@{dtype}-{hashlib.sha256(content).hexdigest()[:12]}"
        self.dim = config.d_model
        shards = (x.addressable_shards[0] for x in jax.tree.leaves(self._params))
        self.nbytes = sum(shard.data.nbytes for shard in shards)
        # A TPU multiplies float32 in bfloat16 passes unless told otherwise.
        precision = "highest" if dtype == "float32" else "default"

        # Without `self`: a cycle would keep the weights until it is collected.
        def run(params, ids, mask):
            with jax.default_matmul_precision(precision):
                return network(config, params, ids, mask)

        self._run = jax.jit(on_mesh(run, self._mesh))

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
            f"{str(path)!r} is no SentencePiece model, or is damaged: {error}"
        ) from None
    ids, pieces = (model.pad_id(), model.eos_id()), model.get_piece_size()
    rows = config.vocab_size
    if ids != (PAD, END) or not pieces <= rows <= pieces + _MORE_ROWS:
        raise UserError(
            f"{str(path)!r} is another model's vocabulary: it has {pieces} pieces with "
            f"pad and end at {ids}; a T5 with an embedding of {rows} rows has "
            f"{max(1, rows - _MORE_ROWS)} to {rows} with pad and end at {(PAD, END)}"
        )
    return model, content
