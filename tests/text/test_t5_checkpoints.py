import shutil

import jax
import numpy as np
import pytest
from flax import serialization, traverse_util

from imagen_jax import sharding
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.models import t5
from imagen_jax.models.t5 import T5Config
from imagen_jax.text import t5_weights
from tests.t5_files import as_t5x, hugging_face, write_safetensors, write_t5x

CONFIG = T5Config(96, 2, 32, 48, 8, 4, dtype="float32")
ONE_DEVICE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def load(path, config=CONFIG, mesh=ONE_DEVICE):
    return t5_weights.load_params(str(path), config, mesh)


def test_the_embedding_may_have_its_other_name(tmp_path):
    tensors = hugging_face(CONFIG)
    params, digest = load(write_safetensors(tmp_path / "a", tensors))
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    assert load(write_safetensors(tmp_path / "b", tensors))[1] == digest


def test_older_and_newer_specs_of_t5x(tmp_path):
    """A path beside the kvstore (gs://t5-data), and Orbax's placeholders."""
    flat = as_t5x(hugging_face(CONFIG), CONFIG)
    folder = write_t5x(tmp_path / "new", flat, inline=())
    digest = load(folder)[1]
    tree = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    leaves = traverse_util.flatten_dict(
        tree["optimizer"], is_leaf=lambda _, v: "driver" in v
    )
    old, orbax = {}, {}
    for path, leaf in leaves.items():
        if path[0] == "target":
            place = leaf["kvstore"]["path"]
            kvstore = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
            old[path] = leaf | {"kvstore": kvstore, "path": place.strip("/")}
            orbax[path] = f"PLACEHOLDER://{place.strip('/')}"
    old = {"version": 3, "optimizer": traverse_util.unflatten_dict(old)}
    for content in (old, traverse_util.unflatten_dict(orbax)):
        (folder / "checkpoint").write_bytes(serialization.to_bytes(content))
        assert load(folder)[1] == digest


def test_what_is_not_whole(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="copy them to a disk first"):
        load("gs://t5-data/pretrained_models/t5x/t5_1_1_xxl/checkpoint_1000000")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="holds no T5 weights: .* PyTorch's .bin files"):
        load(tmp_path / "bin")
    tensors = hugging_face(CONFIG)
    folder = write_safetensors(tmp_path / "x", tensors)
    part = folder / "model-00002-of-00003.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    with pytest.raises(UserError, match="00002.*is missing or damaged"):
        load(folder)
    part.unlink()
    with pytest.raises(UserError, match="00002.*is missing or damaged"):
        load(folder)
    eight = {n: x.astype(np.int8) for n, x in tensors.items()}
    with pytest.raises(UserError, match="is quantised to int8"):
        load(write_safetensors(tmp_path / "y", eight))
    flat = as_t5x(tensors, CONFIG)
    folder = write_t5x(tmp_path / "run" / "checkpoint_7", flat, chunk=16)
    with pytest.raises(UserError, match="run' holds no T5 weights: give a folder"):
        load(tmp_path / "run")
    # tensorstore would take a chunk that is not there for zeros.
    (folder / "target.encoder.layers_1.mlp.wo.kernel" / "1.1").unlink()
    with pytest.raises(UserError, match="wo.kernel/' is missing or damaged"):
        load(folder)
    shutil.rmtree(folder / "target.encoder.layers_0.mlp.wo.kernel")
    with pytest.raises(UserError, match="lacks 'target.encoder.layers_0.mlp.wo.ker"):
        load(folder)
    (folder / "checkpoint").write_bytes(b"\xc1")
    with pytest.raises(UserError, match="checkpoint' is missing or damaged"):
        load(folder)


@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_what_transformers_saved(tmp_path, kind):
    """Written by save_pretrained in several files, and run by transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = getattr(transformers, kind)(theirs).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    params, _ = load(tmp_path)
    ids = np.random.RandomState(0).randint(1, 96, (2, 20))
    with torch.no_grad():
        want = model.get_encoder()(torch.from_numpy(ids)).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        out = t5.T5Encoder(CONFIG).apply({"params": params}, ids, ids > 0)
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()
