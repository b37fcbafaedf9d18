"""Does a picture show its caption? The CLIP score, by a model in a local folder."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.evaluation.features import batches, sha256_of


@dataclasses.dataclass(frozen=True)
class Clip:
    """A CLIP: `run` makes unit vectors of `[N, S, S, 3]` uint8 and of N captions."""

    about: dict[str, str]
    run: Callable[[np.ndarray, Sequence[str]], tuple[np.ndarray, np.ndarray]]


def open_clip(folder: str) -> Clip:
    """The `CLIPModel` of transformers in a folder; a `UserError` if there is none."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    place = pathlib.Path(folder).resolve()
    try:
        sha256 = sha256_of(place / "model.safetensors")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(place)
        # Pillow's resize, as in OpenAI's code.
        processor = transformers.CLIPImageProcessorPil.from_pretrained(place)
        model, info = transformers.CLIPModel.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
        # Without a word transformers draws weights and makes up a tokenizer.
        text = model.config.text_config
        if info["missing_keys"] or len(tokenizer) != text.vocab_size:
            raise OSError("its weights or its tokenizer's files are not all there")
    except Exception as error:  # of many kinds, for files of all kinds
        raise UserError(
            f"--clip={folder!r} holds no CLIP ({' '.join(str(error).split())[:200]}): "
            "give a folder with all of huggingface.co/openai/clip-vit-large-patch14"
        ) from None
    tokenizer.model_max_length = text.max_position_embeddings
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def run(pictures, captions):
        how = {"padding": True, "truncation": True, "return_tensors": "pt"}
        inputs = tokenizer(list(captions), **how)
        inputs |= processor(list(pictures), return_tensors="pt")
        with torch.inference_mode():
            out = model(**inputs.to(model.device))
        return out.image_embeds.cpu().numpy(), out.text_embeds.cpu().numpy()

    return Clip({"clip": place.name, "clip_sha256": sha256}, run)


def clip_score(
    clip: Clip, pictures: Iterable[np.ndarray], captions: Iterable[str]
) -> dict[str, float]:
    """The mean cosine between pictures and their captions.

    And that between pictures and the captions of all others, which it should exceed.
    """
    captions, n, matched, images, texts = iter(captions), 0, 0.0, 0.0, 0.0
    for batch in batches(pictures):
        own = list(itertools.islice(captions, len(batch)))
        image, text = (x.astype(np.float64) for x in clip.run(batch, own))
        n += len(own)
        matched += float((image * text).sum())
        images += image.sum(axis=0)
        texts += text.sum(axis=0)
    others = (float(np.dot(images, texts)) - matched) / max(n * (n - 1), 1)
    return {"CLIP score (mean cosine)": matched / n, "of shuffled captions": others}
