"""Ways to compute the base's attention: bytes and memory on a TPU v4, time here.

JAX_PLATFORMS=cpu python benchmarks/attention.py

The base's attention at 32 x 32 pixels with 128 tokens of text, of 8 pictures, compiled
for one chip: a chip that is not here cannot time it. Then that of a small network in
float32 on the CPU, timed.
"""

import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from imagen_jax.models.attention import attend, flash_attention
from imagen_jax.planning.chips import slice_devices


def flash(*args):
    """The Pallas kernel that comes with JAX."""
    out = flash_attention(*args)
    return out.reshape(*out.shape[:2], -1)


WAYS = {
    "attend": attend,
    "attend, recomputed in the backward pass": jax.checkpoint(attend),
    "flash_attention (Pallas)": flash,
}


def gradient(way):
    """Of the sum of squares, by queries, keys and values."""

    def loss(q, k, v, mask):
        return (way(q, k, v, mask).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def shapes(batch, pixels, text, heads, width, dtype):
    """Of queries, keys, values and the mask."""
    queries = (batch, pixels, heads, width)
    keys = (batch, pixels + text, heads, width)
    return (queries, dtype), (keys, dtype), (keys, dtype), (keys[:2], bool)


def on_tpu():
    """What each way reads, writes and keeps in a gradient."""
    here = SingleDeviceSharding(slice_devices("v4-8")[0])
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for shape, dtype in shapes(8, 1024, 128, 16, 64, jnp.bfloat16)
    ]
    for name, way in WAYS.items():
        compiled = gradient(way).lower(*args).compile()
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        print(
            f"v4 {name}: {cost['bytes accessed'] / 1e9:.2f} GB accessed, "
            f"{cost['flops'] / 1e9:.1f} GFLOP, "
            f"{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
        )


def on_cpu():
    """Milliseconds of a gradient."""
    key = jax.random.key(0)
    args = [
        jnp.ones(shape, dtype) if dtype is bool else jax.random.normal(key, shape)
        for shape, dtype in shapes(8, 256, 32, 4, 64, jnp.float32)
    ]
    runs = {n: gradient(w) for n, w in WAYS.items() if "Pallas" not in n}
    for _ in range(3):
        for name, run in runs.items():
            jax.block_until_ready(run(*args))
            start = time.perf_counter()
            for _ in range(10):
                out = run(*args)
            jax.block_until_ready(out)
            print(f"CPU {name}: {100 * (time.perf_counter() - start):.1f} ms")


if __name__ == "__main__":
    on_tpu()
    on_cpu()
