"""Memory and traffic of attention on a TPU v4, by ways to compute it.

JAX_PLATFORMS=cpu python -m benchmarks.attention

The gradient of the base's attention at 32 x 32 pixels with 128 tokens of text, for 8
images, compiled for one chip and not run.
"""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from imagen_jax.models.attention import attend, flash
from imagen_jax.planning.chips import slice_devices

IMAGES, PIXELS, TOKENS, HEADS, WIDTH = 8, 1024, 128, 16, 64


WAYS = {
    "attend": attend,
    "attend, recomputed in the backward pass": jax.checkpoint(attend),
    "flash (Pallas)": flash,
}


def main():
    """Prints a line per way."""
    device = SingleDeviceSharding(slice_devices("v4-8")[0])

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=device)

    queries = shape(jnp.bfloat16, IMAGES, PIXELS, HEADS, WIDTH)
    keys = shape(jnp.bfloat16, IMAGES, PIXELS + TOKENS, HEADS, WIDTH)
    mask = shape(bool, IMAGES, PIXELS + TOKENS)
    for name, way in WAYS.items():

        def loss(q, k, v, mask, way=way):
            return (way(q, k, v, mask).astype(jnp.float32) ** 2).sum()

        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = gradient.lower(queries, keys, keys, mask).compile()
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        print(
            f"{name}: {cost['bytes accessed'] / 1e9:.2f} GB accessed, "
            f"{cost['flops'] / 1e9:.1f} GFLOP, "
            f"{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
        )


if __name__ == "__main__":
    main()
