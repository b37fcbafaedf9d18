import dataclasses
import gc
import io
import pathlib
import shutil
import sys
import weakref
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

from imagen_jax import prepare, sharding
from imagen_jax.config import MeshConfig
from imagen_jax.data.manifest import read_manifest
from imagen_jax.errors import UserError
from imagen_jax.models import t5
from imagen_jax.text import encoders as text
from imagen_jax.text import t5x as t5x_encoder
from imagen_jax.text.t5 import PretrainedT5
from imagen_jax.text.t5_weights import load_params, tensors
from tests import drawn

REFERENCE = pathlib.Path(__file__).parents[1] / "references" / "t5x.zip"
CONFIG = t5.T5Config(96, 2, 64, 96, 16, 4)
CAPTIONS = ["A red circle.", "a blue square above it", "", "two rings " * 9]


def vocabulary(pieces=64, **options):
    """A SentencePiece model with T5's special tokens, trained on random words."""
    random = np.random.RandomState(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(random.choice(letters, 4)) for _ in range(100)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(random.choice(words, 6)) for _ in range(200)),
        model_writer=model,
        vocab_size=pieces,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def spiece():
    return vocabulary()


@pytest.fixture
def weights(tmp_path, spiece, monkeypatch):
    """A checkpoint of transformers with its vocabulary, under a published name."""
    monkeypatch.setitem(t5.SIZES, "t5_1_1_small", CONFIG)
    return _write(tmp_path / "t5", spiece)


def _write(folder, spiece, change=lambda arrays: None):
    folder.mkdir()
    arrays = {
        t.name: drawn.t5(t.name, t.stored_shape) for t in tensors(CONFIG, "safetensors")
    }
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "spiece.model").write_bytes(spiece)
    return str(folder)


@pytest.fixture
def t5x_folder(tmp_path, spiece):
    """What T5X itself wrote (tests/references/make_t5x.py)."""
    zipfile.ZipFile(REFERENCE).extractall(tmp_path)
    (tmp_path / "sentencepiece.model").write_bytes(spiece)
    return str(tmp_path / "checkpoint_0")


@pytest.mark.slow
def test_equals_t5x_on_a_checkpoint_that_t5x_wrote(t5x_folder):
    with zipfile.ZipFile(REFERENCE) as archive, archive.open("outputs.npz") as file:
        reference = dict(np.load(file))
    config = t5x_encoder.config_of(t5x_folder, "float32")
    assert config == t5.T5Config(96, 2, 32, 48, 12, 4, dtype="float32")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params, _ = load_params(t5x_folder, config, mesh)
    ids = reference["ids"]
    with jax.default_matmul_precision("highest"):
        out = t5.T5Encoder(config).apply({"params": params}, ids, ids > 0)
    error = np.asarray(out)[ids > 0] - reference["out"]
    assert np.abs(error).max() <= 1e-5 * np.abs(reference["out"]).max()


def test_t5x_network(t5x_folder):
    """`--encoder=t5x:` runs T5X's code; ours makes the same of the same captions."""
    pytest.importorskip(
        "t5x.examples.t5.network", reason="T5X is not installed (the extra t5x)"
    )
    theirs = text.load_encoder(f"t5x:{t5x_folder}", "", "float32")
    config = t5x_encoder.config_of(t5x_folder, "float32")
    ours = PretrainedT5("ours", t5x_folder, "float32", config=config)
    for a, b in zip(theirs.encode(CAPTIONS, 12), ours.encode(CAPTIONS, 12)):
        # One unit of bfloat16, in which embeddings are given.
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), 2**-7, 2**-10)
    assert theirs.identity == ours.identity.replace("ours", "t5x")
    again = text.load_encoder(theirs.identity, t5x_folder)
    assert again.identity == theirs.identity


def test_t5x_that_is_not_installed(t5x_folder, monkeypatch):
    for name in ("t5x", "t5x.examples.t5", "t5x.examples.t5.network"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"own network.*pip install 'imagen-jax\[t5x"):
        text.load_encoder(f"t5x:{t5x_folder}")


def test_tokens_are_those_of_sentencepiece(weights, spiece):
    encoder = text.load_encoder("t5_1_1_small", weights)
    model = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    for caption in CAPTIONS[1:]:
        tokens = encoder.tokenize(caption)
        assert tokens[-1] == 1 and model.decode(tokens[:-1]) == caption.strip()
    assert encoder.tokenize("") == [1]


def test_embeddings_are_those_of_each_caption_alone(weights):
    """On eight devices in padded groups, and on one without padding."""
    encoder = text.load_encoder("t5_1_1_small", weights, "float32")
    rows = encoder.encode([*CAPTIONS, CAPTIONS[0]], 12)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(CONFIG, dtype="float32")
    params, _ = load_params(weights, config, mesh)
    run = jax.jit(t5.T5Encoder(config).apply)
    for caption, row in zip([*CAPTIONS, CAPTIONS[0]], rows, strict=True):
        ids = encoder.tokenize(caption)
        if len(ids) > 12:
            ids = ids[:11] + [1]
        ids = np.array([ids])
        want = run({"params": params}, ids, ids > 0)[0]
        assert row.shape == want.shape and row.dtype == "bfloat16"
        # One unit of bfloat16, in which embeddings are given.
        np.testing.assert_allclose(row.astype("f4"), want, rtol=2**-7, atol=2**-10)
    shard = encoder._params["attention_0"]["query"].addressable_shards[0].data
    assert shard.shape == (CONFIG.d_model // 8, 4, 16)
    # Nothing else holds the weights: the stages that follow need the memory.
    held = weakref.ref(encoder._params["attention_0"]["query"])
    gc.disable()
    try:
        del encoder, shard
        assert held() is None
    finally:
        gc.enable()


def test_identity(weights, tmp_path, spiece):
    encoder = text.load_encoder("t5_1_1_small", weights)
    assert encoder.identity.startswith("t5_1_1_small@bfloat16-")
    again = text.load_encoder(encoder.identity, weights)
    assert again.identity == encoder.identity and again.dim == 64
    exact = text.load_encoder("t5_1_1_small", weights, "float32")
    assert text.load_encoder(exact.identity, weights).identity == exact.identity
    assert exact.nbytes > encoder.nbytes > 0
    names = {encoder.identity, exact.identity}
    last = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    other = _write(tmp_path / "a", spiece, lambda t: t[last].__imul__(1.25))
    names.add(text.load_encoder("t5_1_1_small", other).identity)
    tokens = _write(tmp_path / "b", vocabulary(60))
    names.add(text.load_encoder("t5_1_1_small", tokens).identity)
    assert len(names) == 4
    with pytest.raises(UserError, match="was asked for; here is 't5_1_1_small@"):
        text.load_encoder(encoder.identity, other)


def test_what_is_missing_or_does_not_fit(weights, tmp_path):
    with pytest.raises(UserError, match="needs its weights: give --encoder_weights"):
        text.load_encoder("t5_1_1_small")
    with pytest.raises(UserError, match="no weights at '/nowhere'"):
        text.load_encoder("t5_1_1_small", "/nowhere")
    with pytest.raises(UserError, match="does not run in 'float16': use bfloat16 or"):
        text.load_encoder("t5_1_1_small", weights, "float16")
    with pytest.raises(UserError, match="did you mean 't5_1_1_xxl'"):
        text.load_encoder("t5_1_1_xxxl", weights)
    model = pathlib.Path(weights) / "spiece.model"
    shutil.copy(model, tmp_path / "kept")
    model.unlink()
    with pytest.raises(UserError, match="no spiece.model or sentencepiece"):
        text.load_encoder("t5_1_1_small", weights)
    model.write_bytes(b"no model")
    with pytest.raises(UserError, match="no SentencePiece model, or is damaged"):
        text.load_encoder("t5_1_1_small", weights)
    model.write_bytes(vocabulary(100))
    message = "has 100 pieces .* a T5 with an embedding of 96 rows has 1 to 96 with"
    with pytest.raises(UserError, match=message):
        text.load_encoder("t5_1_1_small", weights)
    model.write_bytes(vocabulary(pad_id=-1, eos_id=2, unk_id=0, bos_id=1))
    with pytest.raises(
        UserError, match=r"pad and end at \(-1, 2\); a T5 .* pad and end at \(0"
    ):
        text.load_encoder("t5_1_1_small", weights)


def test_prepare_with_pretrained_weights(weights, tmp_path):
    output = str(tmp_path / "out.npz")
    prepare.prepare(
        "shapes:6",
        output,
        encoder="t5_1_1_small",
        encoder_weights=weights,
        image_size=8,
        text_length=5,
        progress=False,
    )
    manifest = read_manifest(output)
    assert manifest.text_dim == 64 and manifest.tokens_max == 5
    assert manifest.cut_captions == 6
    encoder = text.load_encoder(manifest.encoder, weights)
    assert encoder.identity == manifest.encoder
