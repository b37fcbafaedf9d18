"""Checkpoints of small T5 encoders, written as transformers and T5X write them."""

import json

import numpy as np
import safetensors.numpy
import tensorstore
from flax import serialization, traverse_util

from tests import drawn


def hugging_face(config):
    """Drawn tensors under transformers' names; [out, in] as torch has them."""
    d, inner = config.d_model, config.num_heads * config.d_kv
    shapes = {
        "shared.weight": (config.vocab_size, d),
        "encoder.final_layer_norm.weight": (d,),
    }
    for i in range(config.num_layers):
        attention, ff = (f"encoder.block.{i}.layer.{j}." for j in (0, 1))
        for name in "qkv":
            shapes[f"{attention}SelfAttention.{name}.weight"] = (inner, d)
        shapes[f"{attention}SelfAttention.o.weight"] = (d, inner)
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            shapes[f"{ff}DenseReluDense.{name}.weight"] = (config.d_ff, d)
        shapes[f"{ff}DenseReluDense.wo.weight"] = (d, config.d_ff)
        shapes |= {f"{x}layer_norm.weight": (d,) for x in (attention, ff)}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[bias] = (32, config.num_heads)
    # What a whole model has beside its encoder.
    shapes |= {"lm_head.weight": (8, d), "decoder.final_layer_norm.weight": (d,)}
    return {name: drawn.t5(name, shape) for name, shape in shapes.items()}


def write_safetensors(folder, tensors, files=3):
    """As save_pretrained writes a large model: several files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for k in range(files):
        part = {n: tensors[n] for n in list(tensors)[k::files]}
        file = f"model-{k + 1:05d}-of-{files:05d}.safetensors"
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def as_t5x(tensors, config):
    """The same numbers as T5X names them; its kernels are [in, out]."""
    flat = {
        "token_embedder/embedding": tensors["shared.weight"],
        "encoder/encoder_norm/scale": tensors["encoder.final_layer_norm.weight"],
        "decoder/decoder_norm/scale": tensors["decoder.final_layer_norm.weight"],
        "encoder/relpos_bias/rel_embedding": tensors[
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ].T,
    }
    names = {
        "layer.0.layer_norm": "pre_attention_layer_norm/scale",
        "layer.0.SelfAttention.q": "attention/query/kernel",
        "layer.0.SelfAttention.k": "attention/key/kernel",
        "layer.0.SelfAttention.v": "attention/value/kernel",
        "layer.0.SelfAttention.o": "attention/out/kernel",
        "layer.1.layer_norm": "pre_mlp_layer_norm/scale",
        "layer.1.DenseReluDense.wi": "mlp/wi/kernel",
        "layer.1.DenseReluDense.wi_0": "mlp/wi_0/kernel",
        "layer.1.DenseReluDense.wi_1": "mlp/wi_1/kernel",
        "layer.1.DenseReluDense.wo": "mlp/wo/kernel",
    }
    for i in range(config.num_layers):
        for theirs, t5x in names.items():
            name = f"encoder.block.{i}.{theirs}.weight"
            if name in tensors:
                flat[f"encoder/layers_{i}/{t5x}"] = tensors[name].T
    return flat


def write_t5x(folder, flat, inline=("encoder/encoder_norm/scale",), chunk=40):
    """As T5X's checkpoints.py does: gzipped zarr arrays, their specs in msgpack."""
    leaves = {}
    for name, array in flat.items():
        if name in inline:
            leaves[f"target/{name}"] = array
            continue
        spec = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": {"driver": "file", "path": f"target.{name.replace('/', '.')}/"},
            "metadata": {
                "shape": list(array.shape),
                "chunks": [min(n, chunk) for n in array.shape],
                "compressor": {"id": "gzip", "level": 1},
            },
        }
        here = spec | {"kvstore": {"driver": "file", "path": f"{folder}/target."}}
        here["kvstore"]["path"] += name.replace("/", ".") + "/"
        tensorstore.open(here, create=True).result().write(array).result()
        leaves[f"target/{name}"] = spec
    leaves["state/step"] = np.int32(1_000_000)
    tree = traverse_util.unflatten_dict(leaves, sep="/")
    content = {"version": 3, "optimizer": tree}
    (folder / "checkpoint").write_bytes(serialization.to_bytes(content))
    return folder
