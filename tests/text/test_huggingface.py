"""On small random models; skipped where transformers or torch is not installed."""

import sys

import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.text import encoders as text

CAPTIONS = ["a red circle", "blue", "a red circle", "a blue a red a blue"]


def test_transformers_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'imagen-jax\[encoders\]'"):
        text.load_encoder("hf:bert-base-uncased")


def _tokenizer(transformers):
    import tokenizers

    words = "[PAD] [UNK] [CLS] [SEP] a red circle blue".split()
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="[UNK]"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def _model(transformers, kind):
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=8, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        )
        return transformers.T5ForConditionalGeneration(config)
    sizes = dict(
        vocab_size=8,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=20,
    )
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes))
    picture = dict(sizes, image_size=8, patch_size=4)
    del picture["vocab_size"], picture["max_position_embeddings"]
    ends = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 3}
    config = transformers.CLIPConfig(text_config=sizes | ends, vision_config=picture)
    return transformers.CLIPModel(config)


def _expected(model, kind, ids):
    """Of one caption without padding; CLIP's penultimate layer by a hook."""
    import torch

    with torch.no_grad():
        if kind == "clip":
            kept = []
            layer = model.text_model.encoder.layers[-2]
            layer.register_forward_hook(lambda *a: kept.append(a[-1]))
            model.text_model(input_ids=ids)
            out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            return out.reshape(-1, 32).numpy()
        encoder = model.get_encoder() if kind == "t5" else model
        return encoder(input_ids=ids).last_hidden_state[0].numpy()


@pytest.mark.parametrize("kind", ["bert", "clip", "t5"])
def test_equals_the_model_on_each_caption_alone(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = _model(transformers, kind).eval()
    place = str(tmp_path / kind)
    model.save_pretrained(place)
    _tokenizer(transformers).save_pretrained(place)
    encoder = text.load_encoder(f"hf:{place}")
    assert encoder.dim == 32
    assert encoder.tokenize("a red circle") == [2, 4, 5, 6, 3]
    for caption, row in zip(CAPTIONS, encoder.encode(CAPTIONS, 6), strict=True):
        ids = encoder.tokenize(caption)
        # What is cut keeps its end.
        ids = ids if len(ids) <= 6 else ids[:5] + [3]
        want = _expected(model, kind, torch.tensor([ids]))
        # Half a unit of bfloat16, in which embeddings are given.
        np.testing.assert_allclose(row.astype("f4"), want, rtol=2**-8, atol=1e-5)

    # The place does not matter, the numbers do.
    assert encoder.identity.startswith(f"hf:{kind}@float32-")
    moved = tmp_path / "elsewhere"
    model.save_pretrained(moved)
    _tokenizer(transformers).save_pretrained(moved)
    again = text.load_encoder(encoder.identity, str(moved))
    assert again.identity == encoder.identity
    table = {"bert": "word_embeddings", "clip": "token_embedding", "t5": "shared"}[kind]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if table in n).add_(1.0)
    model.save_pretrained(moved)
    with pytest.raises(UserError, match="was asked for; here is"):
        text.load_encoder(encoder.identity, str(moved))


def test_what_transformers_cannot_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="transformers cannot load"):
        text.load_encoder(f"hf:{tmp_path}")
    model, place = _model(transformers, "bert"), str(tmp_path / "bert")
    model.save_pretrained(place)
    _tokenizer(transformers).save_pretrained(place)
    encoder = text.load_encoder(f"hf:{place}")
    with pytest.raises(UserError, match="at most 20 tokens .* --text_length=20"):
        encoder.encode(["a"], 21)
    with pytest.raises(UserError, match="float32 only, not in 'bfloat16'"):
        text.load_encoder(f"hf:{place}", "", "bfloat16")
    state = model.state_dict()
    del state["encoder.layer.1.attention.self.query.weight"]
    model.save_pretrained(place, state_dict=state)
    with pytest.raises(UserError, match="lacks 1 tensors of its model, first 'enc"):
        text.load_encoder(f"hf:{place}")
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="transformers cannot load .*header"):
        text.load_encoder(f"hf:{place}")
