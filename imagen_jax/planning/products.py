"""The arithmetic of a compiled program's products and convolutions."""

import math
import re

import numpy as np

from imagen_jax.planning.hlo import Computation, Op


def dot(op: Op, inside: Computation) -> float:
    """Two for each multiplication with its addition."""
    left = inside.ops[op.operands[0]].arrays[0]
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    summed = math.prod(left.shape[int(a)] for a in axes[1].split(",") if a)
    return 2 * summed * math.prod(op.arrays[0].shape)


def convolution(op: Op, inside: Computation) -> float:
    """Two for each element that meets a weight; padding is none.

    A TPU's compiler writes products as convolutions too, some of them with padding
    all around.
    """
    left = inside.ops[op.operands[0]].arrays[0]
    right = inside.ops[op.operands[1]].arrays[0]
    image, kernel, result = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest
    ).groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", _window(op.rest)))
    spatial = [d for d in image if d.isdigit()]

    def values(name, default):
        text = window.get(name)
        return text.split("x") if text else [default] * len(spatial)

    pairs = 1
    fields = zip(
        spatial,
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    )
    for label, stride, pad, spread, dilation in fields:
        pairs *= _pairs(
            left.shape[image.index(label)],
            right.shape[kernel.index(label)],
            op.arrays[0].shape[result.index(label)],
            int(stride),
            int(pad.split("_")[0]),
            int(spread),
            int(dilation),
        )
    groups = re.search(r"batch_group_count=(\d+)", op.rest)
    rows = left.shape[image.index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * pairs * rows * math.prod(right.shape[kernel.index(c)] for c in "io")


def _window(rest: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", rest)
    return found[1] if found else ""


def _pairs(
    size: int, kernel: int, out: int, stride: int, low: int, spread: int, dilation: int
) -> int:
    """How many of an output's places times a kernel's meet an element of the input."""
    # A TPU's compiler makes batches of thousands to windows: no loops over both.
    first = np.arange(kernel) * dilation - low
    last = (size - 1) * spread
    lowest = np.maximum(-(first // stride), 0)  # the first place that is inside
    highest = np.minimum((last - first) // stride, out - 1)
    if spread == 1:
        return int(np.maximum(highest - lowest + 1, 0).sum())
    count = 0
    for rest in range(min(spread, out)):
        # Every spread-th place of the output meets an element, or none does.
        below = (highest - rest) // spread - (lowest - 1 - rest) // spread
        meets = (first + rest * stride) % spread == 0
        count += int((np.maximum(below, 0) * meets).sum())
    return count


# Products of [T, D] with [S, D], or of that size, in JAX's attention kernel for TPUs:
# logits and output; logits again, and gradients of values, weights and keys; logits
# again, and gradients of weights and queries.
_ATTENTION = {
    "flash_attention": 2,
    "flash_mha_bwd_dkv": 4,
    "flash_mha_bwd_dq": 3,
}


def attention(op: Op, inside: Computation) -> float:
    """Of JAX's attention kernel; 0 for another kernel."""
    for name, products in _ATTENTION.items():
        if op.name.startswith(name):
            queries, keys = (inside.ops[n].arrays[0].shape for n in op.operands[:2])
            return 2.0 * products * math.prod(queries) * keys[2]
    return 0.0
