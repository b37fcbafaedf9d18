"""Text encoders of Hugging Face transformers, run by torch in float32."""

import hashlib
import pathlib

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.text.embeddings import encode_groups


class TransformersEncoder:
    """BERT, CLIP's text half, any T5 or another encoder that transformers knows.

    As in the paper's ablations: BERT's and T5's last layer, CLIP's penultimate one
    (App. D.1). Runs on torch's GPU if there is one. The hash in its identity
    "hf:NAME@float32-HASH" covers weights and vocabulary.
    """

    def __init__(self, name: str, weights: str = "", dtype: str = "float32"):
        """Loads a model of the Hub or a folder; the folder `weights` replaces it."""
        if dtype != "float32":
            raise UserError(f"'hf:' encoders run in float32 only, not in {dtype!r}")
        model, self._tokenizer = _load(weights or name)
        config = model.config
        self._layer = -2 if "clip" in config.model_type else -1
        self.dim = config.hidden_size
        self.nbytes = sum(x.nbytes for x in model.parameters())
        self._longest = getattr(config, "max_position_embeddings", None)
        # The name of a folder, not its path: moved weights stay the same encoder.
        is_local = weights or pathlib.Path(name).is_dir()
        shown = pathlib.Path(name or weights).name if is_local else name
        digest = _digest(model, self._tokenizer)
        self.identity = f"hf:{shown}@float32-{digest[:12]}"
        self._model = model.eval()

    def tokenize(self, caption: str) -> list[int]:
        """All tokens of the caption and those that the model puts around them."""
        return self._tokenizer(caption, truncation=False, verbose=False)["input_ids"]

    def encode(self, captions: list[str], length: int) -> list[np.ndarray]:
        """See `encoders.TextEncoder`."""
        if self._longest and length > self._longest:
            raise UserError(
                f"{self.identity!r} takes at most {self._longest} tokens of a caption, "
                f"not {length}: give --text_length={self._longest}"
            )
        tokens = self._tokenizer(captions, truncation=True, max_length=length)
        return encode_groups(tokens["input_ids"], length, self._embed)

    def _embed(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(ids).long().to(self._model.device),
                attention_mask=torch.from_numpy(mask).long().to(self._model.device),
                output_hidden_states=True,
            )
        return out.hidden_states[self._layer].float().cpu().numpy()


def _load(place: str):
    try:
        import torch
        import transformers
        from safetensors import SafetensorError
    except ImportError as error:
        raise UserError(
            f"--encoder=hf:... needs transformers and torch, which cannot be imported "
            f"({error}): pip install 'imagen-jax[encoders]'"
        ) from None
    # It warns of every tensor beside the text encoder; missing ones are an error below.
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        config = transformers.AutoConfig.from_pretrained(place)
        # CLIP's checkpoints hold an image half too.
        is_clip = config.model_type in ("clip", "clip_text_model")
        kind = "CLIPTextModel" if is_clip else "AutoModelForTextEncoding"
        model, info = getattr(transformers, kind).from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers cannot load {place!r}: {reason}; if it is in a folder, "
            "give that as --encoder_weights"
        ) from None
    # transformers draws missing tensors at random.
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise UserError(
            f"{place!r} lacks {len(missing)} tensors of its model, first "
            f"{missing[0]!r}: it is damaged, or holds no text encoder"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _digest(model, tokenizer) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "pooler" not in name:
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(f"{type(tokenizer).__name__} {vocabulary}".encode())
    return digest.hexdigest()
