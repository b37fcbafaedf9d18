"""Weights that a test and the script of its reference draw alike."""

import zlib

import numpy as np


def t5(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of transformers' T5, float32; the bits depend on name and shape only.

    Uniform, with the deviation that T5 starts with; norms lie in [0.5, 1.5].
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    # Drawn as bytes: ten times as fast as floats, and XXL has many.
    x = random.randint(-127, 128, shape, np.int8).astype(np.float32)
    if len(shape) == 1:
        return 1 + x / 254
    width = shape[1]
    stddev = 1.0
    if name.endswith("SelfAttention.q.weight"):
        # d_kv is 64 in every size that is drawn.
        stddev = (width * 64) ** -0.5
    elif "shared" not in name and "relative" not in name:
        stddev = width**-0.5
    x *= np.float32(stddev / (127 / 3**0.5))
    return x
