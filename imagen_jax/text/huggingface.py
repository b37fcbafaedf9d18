"""Text encoders of Hugging Face transformers, run by torch in float32."""

import hashlib
import pathlib

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.text.caption_groups import encode_groups


class TransformersEncoder:
    """BERT, CLIP's text half, any T5 or another encoder that transformers knows.

    The paper's ablations: BERT's and T5's last layer, CLIP's penultimate one (App.
    D.1). Runs on torch's GPU if it has one.

    Attributes:
      identity: "hf:NAME@float32-HASH", the hash that of weights and vocabulary.
      dim: width of one token's embedding.
    """

    def __init__(self, name: str, weights: str = "", dtype: str = "float32"):
        """Loads weights and tokens.

        Args:
          name: of a model on the Hugging Face Hub, or a folder of save_pretrained.
          weights: a folder that takes the place of `name`.
          dtype: "float32"; no other is run.

        Raises:
          UserError: when transformers or torch is missing, or cannot load it.
        """
        if dtype != "float32":
            raise UserError(f"'hf:' encoders run in float32 only, not in {dtype!r}")
        place = weights or name
        model, self._tokenizer = _load(place)
        self._layer = -2 if "clip" in model.config.model_type else -1
        self._device = _device()
        self._model = model.to(self._device).eval()
        self.dim = model.config.hidden_size
        self._longest = getattr(model.config, "max_position_embeddings", None)
        if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            # Their positions start after that of the padding.
            self._longest -= model.config.pad_token_id + 1
        digest = _digest(model, self._tokenizer)
        # Where a folder lies is nothing to its embeddings.
        local = weights or pathlib.Path(name).is_dir()
        shown = pathlib.Path(name or weights).name if local else name
        self.identity = f"hf:{shown}@float32-{digest[:12]}"

    def tokenize(self, caption: str) -> list[int]:
        """All of the caption's tokens and those that the model puts around them."""
        return self._tokenizer(caption, truncation=False, verbose=False)["input_ids"]

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """Embeds captions; what is longer than `length` tokens loses its tail.

        Returns:
          one `[n_i, dim]` bfloat16 per caption, `1 <= n_i <= length`.

        Raises:
          UserError: when `length` is more than the model has positions for.
        """
        if self._longest and length > self._longest:
            raise UserError(
                f"{self.identity!r} takes at most {self._longest} tokens of a caption, "
                f"not {length}: give --text_length={self._longest}"
            )
        tokens = self._tokenizer(captions, truncation=True, max_length=length)
        return encode_groups(tokens["input_ids"], self._embed)

    def _embed(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(ids).long().to(self._device),
                attention_mask=torch.from_numpy(mask).long().to(self._device),
                output_hidden_states=True,
            )
        return out.hidden_states[self._layer].float().cpu().numpy()


def _load(place: str):
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--encoder=hf:... needs transformers and torch, which cannot be imported "
            f"({error}): pip install 'imagen-jax[encoders]'"
        ) from None
    verbosity = transformers.logging.get_verbosity()
    # It lists what a checkpoint has beside the text encoder; what it lacks is below.
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        config = transformers.AutoConfig.from_pretrained(place)
        # CLIP's checkpoints hold a picture half too.
        is_clip = config.model_type in ("clip", "clip_text_model")
        kind = "CLIPTextModel" if is_clip else "AutoModelForTextEncoding"
        model, info = getattr(transformers, kind).from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers cannot load {place!r}: {reason}; if it lies in a folder, "
            "give that as --encoder_weights"
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    # It draws at random what a checkpoint lacks, and goes on.
    lacking = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if lacking:
        raise UserError(
            f"{place!r} lacks {len(lacking)} tensors of its model, first "
            f"{lacking[0]!r}: it is damaged, or holds no text encoder"
        )
    return model, tokenizer


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _digest(model, tokenizer) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "pooler" not in name:
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(f"{type(tokenizer).__name__} {vocabulary}".encode())
    return digest.hexdigest()
