"""Times the percentile of dynamic thresholding beside a sort.

python benchmarks/percentile.py
"""

import time

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.guidance import percentile_of_size

# Pictures and pixels of a side.
SHAPES = ((16, 64), (4, 256), (1, 1024))


def sort(x):
    """The same by `jnp.percentile`, which sorts."""
    return jnp.percentile(jnp.abs(x.reshape(len(x), -1)), 99.5, axis=1)


def count(x):
    """As the sampler finds it."""
    return percentile_of_size(x, 99.5)


def main():
    """Prints a row per size: the fastest of ten runs."""
    print("| values | counting | sorting |\n|---|---|---|")
    for pictures, side in SHAPES:
        x = jax.random.normal(jax.random.key(0), (pictures, side, side, 3))
        fastest = []
        for way in (count, sort):
            run, seconds = jax.jit(way), []
            run(x).block_until_ready()
            for _ in range(10):
                start = time.perf_counter()
                run(x).block_until_ready()
                seconds.append(time.perf_counter() - start)
            fastest.append(f"{1e3 * min(seconds):.1f} ms")
        print(f"| {pictures} of {side} pixels | {' | '.join(fastest)} |")


if __name__ == "__main__":
    main()
