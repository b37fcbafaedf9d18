import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.models import t5
from imagen_jax.models.t5 import T5Config
from imagen_jax.text import t5_weights
from tests import drawn
from tests.t5_files import as_t5x, hugging_face, write_safetensors, write_t5x

REFERENCES = pathlib.Path(__file__).parents[1] / "references"
CONFIG = T5Config(96, 2, 32, 48, 8, 4, dtype="float32")
RELU = dataclasses.replace(CONFIG, gated=False)
ONE_DEVICE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def load(path, config=CONFIG, mesh=ONE_DEVICE):
    return t5_weights.load_params(str(path), config, mesh)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize("config", [CONFIG, RELU], ids=["gated", "relu"])
def test_safetensors_and_t5x_are_the_same_arrays(tmp_path, config):
    tensors = hugging_face(config)
    params, digest = load(write_safetensors(tmp_path / "many", tensors), config)
    for place in (
        write_safetensors(tmp_path / "one", tensors, files=1),
        tmp_path / "one" / "model.safetensors",
        write_t5x(tmp_path / "checkpoint_1000000", as_t5x(tensors, config)),
    ):
        other, other_digest = load(place, config)
        assert equal(params, other) and digest == other_digest
    # Not by our own names and reshapes: one head's query of one layer.
    query = tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    head = np.asarray(params["attention_1"]["query"])[:, 2]
    np.testing.assert_array_equal(head, query[16:24].T)
    out = tensors["encoder.block.1.layer.0.SelfAttention.o.weight"]
    head = np.asarray(params["attention_1"]["out"])[2]
    np.testing.assert_array_equal(head, out[:, 16:24].T)


def test_kernels_are_kept_in_the_compute_type(tmp_path):
    path = write_safetensors(tmp_path / "x", hugging_face(CONFIG))
    whole, _ = load(path)
    half, digest = load(path, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert half["feed_forward_0"]["out"].dtype == ml_dtypes.bfloat16
    for name in ("token_embedding", "relative_bias"):
        assert half[name].dtype == np.float32
    cast = jax.tree.map(lambda x, y: x.astype(y.dtype), whole, half)
    assert equal(cast, half)
    # A copy that was stored in bfloat16 makes the same embeddings where they say so.
    tensors = {
        name: x.astype(ml_dtypes.bfloat16) if x.ndim == 2 and "layer" in name else x
        for name, x in hugging_face(CONFIG).items()
        if "relative" not in name
    }
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors[bias] = hugging_face(CONFIG)[bias]
    stored = write_safetensors(tmp_path / "y", tensors)
    assert load(stored, dataclasses.replace(CONFIG, dtype="bfloat16"))[1] == digest


@pytest.mark.parametrize("kind", ["safetensors", "t5x"])
def test_what_does_not_fit_is_named_with_both_shapes(tmp_path, kind):
    def written(change):
        tensors = hugging_face(CONFIG)
        change(tensors)
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        if kind == "t5x":
            return write_t5x(tmp_path / "x", as_t5x(tensors, CONFIG))
        return write_safetensors(tmp_path / "x", tensors)

    def error(change, config=CONFIG):
        with pytest.raises(UserError) as caught:
            load(written(change), config)
        return str(caught.value)

    q = "encoder.block.1.layer.0.SelfAttention.q.weight"
    stored = (32, 40) if kind == "t5x" else (40, 32)
    message = error(lambda t: t.update({q: np.zeros((40, 32), np.float32)}))
    assert f"of shape {stored}, not (32, 32)" in message
    assert ("layers_1.attention.query" if kind == "t5x" else q) in message
    message = error(lambda t: t.pop(q))
    assert "lacks" in message and "of shape (32, 32)" in message
    rows = dataclasses.replace(CONFIG, vocab_size=224)
    assert "of shape (96, 32), not (224, 32)" in error(lambda t: None, rows)
    fewer = dataclasses.replace(CONFIG, num_layers=1)
    assert "this size does not have (and 8 more)" in error(lambda t: None, fewer)
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    message = error(lambda t: t[wo].__setitem__((3, 5), np.inf))
    assert "inf or NaN" in message
    assert "wi" in error(lambda t: None, RELU)


class Drawn:
    """A checkpoint whose numbers are those of tests/references/make_t5_sizes.py."""

    kind = "safetensors"

    def __init__(self, config):
        stored = t5_weights.tensors(config, self.kind)
        self.shapes = {tensor.name: tensor.stored_shape for tensor in stored}

    def read(self, name):
        return drawn.t5(name, self.shapes[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("t5_1_1_small", {}),
        ("t5_1_0_small", {}),
        ("t5_1_1_xxl", {"num_layers": 1, "vocab_size": 512}),
    ],
)
def test_published_sizes_equal_transformers(monkeypatch, name, cut):
    with np.load(REFERENCES / "t5_sizes.npz") as file:
        ids, want = file[f"{name}.ids"], file[name]
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 1e-2)):
        config = dataclasses.replace(t5.SIZES[name], dtype=dtype, **cut)
        monkeypatch.setattr(t5_weights, "open_checkpoint", lambda _, c=config: Drawn(c))
        params, _ = load("drawn", config)
        precision = "highest" if dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            run = jax.jit(t5.T5Encoder(config).apply)
            out = np.asarray(run({"params": params}, ids, ids > 0), np.float32)
        out = out[ids > 0][:, :: config.d_model // want.shape[1]]
        assert np.linalg.norm(out - want) <= bound * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1, 1, 8), (1, 8, 1), (2, 2, 2)])
def test_eight_devices_equal_one(tmp_path, axes):
    config = T5Config(96, 2, 64, 96, 16, 8, dtype="float32")
    path = write_safetensors(tmp_path / "x", hugging_face(config))
    ids = np.random.default_rng(0).integers(1, 96, (8, 24))
    ids[3, 9:] = 0

    def run(mesh):
        params, digest = load(path, config, mesh)
        rows = jax.device_put(ids, sharding.batch_sharding(mesh))
        apply = sharding.on_mesh(t5.T5Encoder(config).apply, mesh)
        return params, digest, jax.jit(apply)({"params": params}, rows, rows > 0)

    mesh = sharding.make_mesh(MeshConfig(axes[0], axes[1], tensor=axes[2]))
    params, digest, out = run(mesh)
    _, one_digest, want = run(ONE_DEVICE)
    assert digest == one_digest
    parts = {"fsdp": axes[1], "tensor": axes[2]}
    for kernel in ("query", "out"):
        leaf = params["attention_1"][kernel]
        share = leaf.addressable_shards[0].data.size / leaf.size
        assert share == 1 / (parts["fsdp"] * parts["tensor"])
    # Float32 sums of at most 96 terms in another order, through four residual sums.
    bound = 4 * 96 * np.finfo(np.float32).eps * np.abs(want).max()
    assert np.abs(np.asarray(out) - np.asarray(want))[ids > 0].max() <= bound


MEASURE = """
import dataclasses, json, sys
import jax, numpy as np
from imagen_jax import sharding
from imagen_jax.config import MeshConfig
from imagen_jax.text.t5_weights import load_params
from imagen_jax.models.t5 import T5Config

def held(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))

small, large, config, dtype = json.loads(sys.argv[1])
config = T5Config(**config | {"dtype": dtype})
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
# Libraries are loaded, and programs compiled, by then.
load_params(small, dataclasses.replace(config, num_layers=1), mesh)
before = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
params, _ = load_params(large, config, mesh)
on_devices = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(held("VmHWM") - before - on_devices, on_devices)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc"
)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("safetensors", "float32"), ("t5x", "bfloat16")]
)
def test_the_host_holds_less_than_three_tensors(tmp_path, kind, dtype):
    """Beside what lies on the devices, which on a CPU are the host's memory too."""
    config = T5Config(64, 6, 1024, 2048, 64, 8)
    paths = {}
    for layers in (1, config.num_layers):
        cut = dataclasses.replace(config, num_layers=layers)
        tensors, folder = hugging_face(cut), tmp_path / str(layers)
        if kind == "t5x":
            folder.mkdir()
            write_t5x(folder, as_t5x(tensors, cut), chunk=512)
        else:
            write_safetensors(folder, tensors, files=2)
        paths[layers] = str(folder)
    largest = max(x.nbytes for x in tensors.values())
    stored = sum(x.nbytes for x in tensors.values())
    assert stored > 20 * largest
    arguments = json.dumps([*paths.values(), dataclasses.asdict(config), dtype])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    held, on_devices = map(int, done.stdout.split())
    assert on_devices > stored / (1 if dtype == "float32" else 2) * 0.99
    assert held < 3 * largest, f"{held / largest:.2f} times the largest tensor"
