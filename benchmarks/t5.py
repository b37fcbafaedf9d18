"""T5-XXL: what it takes to load here, and to run on a TPU v4-8.

JAX_PLATFORMS=cpu python -m benchmarks.t5 --size=t5_1_1_xxl [--folder=FOLDER]

Draws a checkpoint of the size as sharded safetensors in FOLDER (XXL: 19 GB), which is
left there, and loads it in bfloat16: seconds and memory. Without --folder it compiles
the embedding of 64 captions of 128 tokens for the slice instead.
"""

import argparse
import functools
import json
import multiprocessing
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from imagen_jax import cli, sharding
from imagen_jax.config import MeshConfig
from imagen_jax.models.t5 import SIZES, abstract_params
from imagen_jax.planning.chips import slice_devices
from imagen_jax.text import t5 as t5_encoder
from imagen_jax.text import t5_weights


def write(size, folder):
    """A checkpoint of random numbers, in files of about 1 GB."""
    folder.mkdir(parents=True, exist_ok=True)
    random, index, part = np.random.default_rng(0), {}, {}
    wanted = list(t5_weights.tensors(SIZES[size], "safetensors"))
    for tensor in wanted:
        x = random.standard_normal(tensor.stored_shape, np.float32)
        part[tensor.name] = x * tensor.shape[0] ** -0.5
        if tensor is wanted[-1] or sum(x.nbytes for x in part.values()) > 1e9:
            file = f"model-{len(set(index.values())):05d}.safetensors"
            safetensors.numpy.save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
            part = {}
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def load(size, folder):
    """Seconds, and the process's memory beside that of the arrays."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
    before, start = cli.peak_memory_gib(), time.perf_counter()
    params, _ = t5_weights.load_params(str(folder), SIZES[size], mesh)
    seconds = time.perf_counter() - start
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**30
    print(
        f"{size}: {seconds:.0f} s, {arrays:.2f} GiB of arrays, at most "
        f"{cli.peak_memory_gib():.2f} GiB held, {before:.2f} before"
    )


def on_tpu(size):
    """What a chip of a v4-8 holds while it embeds its share of 64 captions."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), slice_devices("v4-8"))
    config = SIZES[size]
    shardings = sharding.state_shardings(abstract_params(config), mesh)
    shardings = traverse_util.flatten_dict(shardings, sep=".")
    params = {
        tensor.path: jax.ShapeDtypeStruct(
            tensor.shape,
            jnp.float32 if tensor.exact else jnp.bfloat16,
            sharding=shardings[tensor.path],
        )
        for tensor in t5_weights.tensors(config, "safetensors")
    }
    rows = sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((64, 128), jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct((64, 128), jnp.bool_, sharding=rows)
    run = sharding.on_mesh(functools.partial(t5_encoder.run_t5, config), mesh)
    params = traverse_util.unflatten_dict(params, sep=".")
    memory = jax.jit(run).lower(params, ids, mask).compile().memory_analysis()
    print(
        f"v4-8, {size}: {memory.argument_size_in_bytes / 2**30:.2f} GiB of weights a "
        f"chip, {memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="t5_1_1_xxl", choices=SIZES)
    parser.add_argument("--folder", type=pathlib.Path)
    args = parser.parse_args()
    if args.folder:
        # Elsewhere, so that what it holds is not counted.
        writer = multiprocessing.get_context("spawn").Process(
            target=write, args=(args.size, args.folder)
        )
        writer.start()
        writer.join()
        load(args.size, args.folder)
    else:
        on_tpu(args.size)
