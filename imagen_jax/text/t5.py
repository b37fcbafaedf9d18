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
from imagen_jax.models.t5 import SIZES, T5Config, T5Encoder
from imagen_jax.sharding import batch_sharding, make_mesh, on_mesh, row_shards
from imagen_jax.text.caption_groups import END, PAD, ROWS, cut, encode_groups
from imagen_jax.text.t5_checkpoints import existing
from imagen_jax.text.t5_weights import load_params

# Of Hugging Face and of gs://t5-data/vocabs.
_VOCABULARIES = ("spiece.model", "sentencepiece.model")
# The table has a row for each piece, for up to 100 sentinels, and is then padded to a
# multiple of 128: 32,000 pieces make 32,128 rows, mT5's 250,000 make 250,112.
_MORE_ROWS = 100 + 127


class PretrainedT5:
    """A T5 encoder of any size, from the weights that its authors gave.

    Attributes:
      identity: "NAME@DTYPE-HASH", the hash that of the weights' numbers and of the
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
          name: a key of `models.t5.SIZES`, or what the identity begins with.
          weights: a checkpoint, with a SentencePiece model beside it.
          dtype: "bfloat16" or "float32".
          mesh: of devices of this process; by default all of them are one fsdp axis:
            each holds a share of the weights and embeds a share of the captions.
          config: sizes, where `name` is no key.
          network: `(config, params, ids, mask) -> [B, L, dim]` that is run; ours by
            default.

        Raises:
          UserError: when weights or vocabulary are missing or do not fit the size.
        """
        if not weights:
            raise UserError(
                f"the encoder {name!r} needs its weights: give "
                "--encoder_weights=FOLDER (docs/text_encoders.md tells where they are)"
            )
        self._config = dataclasses.replace(config or SIZES[name], dtype=dtype)
        if mesh is None:
            # Not jax.devices(): processes of a pod embed captions of their own.
            mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
        self._mesh = mesh
        self._vocabulary, vocabulary_bytes = _open_vocabulary(weights)
        _check_vocabulary(self._vocabulary, weights, self._config)
        self._params, numbers = load_params(weights, self._config, mesh)
        content = numbers.encode() + hashlib.sha256(vocabulary_bytes).digest()
        digest = hashlib.sha256(content).hexdigest()[:12]
        self.identity = f"{name}@{dtype}-{digest}"
        self.dim = self._config.d_model
        self._run = jax.jit(
            on_mesh(functools.partial(network or _ours, self._config), mesh)
        )

    def tokenize(self, caption: str) -> list[int]:
        """Pieces of the SentencePiece model, then the end."""
        return [*self._vocabulary.encode(caption), END]

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """Embeds captions; what is longer than `length` tokens loses its tail.

        Returns:
          one `[n_i, dim]` bfloat16 per caption, `1 <= n_i <= length`.
        """
        tokens = [cut(self.tokenize(caption), length) for caption in captions]
        ways = row_shards(self._mesh)
        return encode_groups(tokens, self._embed, -(-ROWS // ways) * ways)

    def _embed(self, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        ids, mask = jax.device_put((ids, mask), batch_sharding(self._mesh))
        return self._run(self._params, ids, mask)


def _ours(config, params, ids, mask):
    # A TPU multiplies float32 in bfloat16 passes unless told otherwise.
    precision = "highest" if config.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        return T5Encoder(config).apply({"params": params}, ids, mask)


def _open_vocabulary(weights: str):
    """The SentencePiece model beside the weights, and the bytes of its file."""
    import sentencepiece

    place = existing(weights)
    folder = place if place.is_dir() else place.parent
    # T5X has one model for all checkpoints of a run.
    for path in (f / n for f in (folder, folder.parent) for n in _VOCABULARIES):
        if path.is_file():
            content = path.read_bytes()
            try:
                model = sentencepiece.SentencePieceProcessor(model_proto=content)
            except RuntimeError as error:
                raise UserError(
                    f"{str(path)!r} is no SentencePiece model, or is damaged "
                    f"({error}): copy it again"
                ) from None
            return model, content
    raise UserError(
        f"there is no {' or '.join(_VOCABULARIES)} beside the weights {weights!r}: "
        "copy the vocabulary there (docs/text_encoders.md tells from where)"
    )


def _check_vocabulary(vocabulary, weights: str, config: T5Config) -> None:
    where = f"the SentencePiece model beside {weights!r}"
    ids = vocabulary.pad_id(), vocabulary.eos_id()
    if ids != (PAD, END):
        raise UserError(
            f"{where} has pad and end at {ids}, T5's has them at {(PAD, END)}: it is "
            "another model's vocabulary"
        )
    pieces, rows = vocabulary.get_piece_size(), config.vocab_size
    if not pieces <= rows <= pieces + _MORE_ROWS:
        raise UserError(
            f"{where} has {pieces} pieces; the token embedding of shape "
            f"{(rows, config.d_model)} is for {max(1, rows - _MORE_ROWS)} to {rows} of "
            "them: it is another model's vocabulary"
        )
