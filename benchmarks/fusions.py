"""What the TPU's compiler makes of a residual block: which steps become one.

JAX_PLATFORMS=cpu python benchmarks/fusions.py

Each line is a fusion that reads or writes a whole picture's activations: what it
computes, by the names of the modules and functions in it.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from imagen_jax.models.blocks import ResBlock
from imagen_jax.planning.chips import slice_devices

BATCH, SIZE, CHANNELS = 8, 32, 1024


def main():
    """Compiles the block of the base at 32 pixels for one chip of a TPU v4."""
    here = SingleDeviceSharding(slice_devices("v4-8")[0])

    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    block = ResBlock(CHANNELS, jnp.bfloat16, 0.0)
    x, emb = spec(BATCH, SIZE, SIZE, CHANNELS), spec(BATCH, 2048)
    params = nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x, emb))
    params = jax.tree.map(lambda p: spec(*p.shape, dtype=p.dtype), params)
    program = jax.jit(block.apply).lower(params, x, emb).compile().as_text()
    bodies = dict(
        re.findall(r"%(fused_computation[\w.]*) .*?\{\n(.*?)\n\}", program, re.S)
    )
    entry = program[program.index("ENTRY") :]
    whole = f"[{BATCH},{SIZE},{SIZE},{CHANNELS}]"
    for line in entry.splitlines():
        called = re.search(r"fusion\(.*calls=%([\w.]+)", line)
        steps = bodies[called[1]] if called else ""
        if whole in steps:
            names = re.findall(r'op_name="jit\(.*?\)/ResBlock/([^"]*)"', steps)
            print(f"{line.split(' = ')[0].strip()}: {', '.join(dict.fromkeys(names))}")


if __name__ == "__main__":
    main()
