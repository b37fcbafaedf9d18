"""The blocks of sr256 in little: what GroupNorm's epsilon does to a deep network.

--config=benchmarks/claims/deep.py:eps5, with 1e-5 as imagen_jax has it, or :eps6.

Blocks start as the identity times 1 / sqrt(2), so that the 44 of them hand ever smaller
numbers down: at the deepest level their variance is no longer far above 1e-5.
"""

import functools

from imagen_jax.configs import common, sr256
from imagen_jax.models import layers


def get_config(variant: str):
    """One of the two."""
    return common.pick({"eps5": deep, "eps6": smaller_epsilon}, variant)


def deep():
    """All levels and blocks of sr256 with an eighth of its channels, to 32 pixels."""
    cfg = common.shrink(sr256.sr256(), 32)
    paper = sr256.sr256().model
    cfg.model.update(
        channels=tuple(width // 8 for width in paper.channels),
        num_res_blocks=paper.num_res_blocks,
        self_attention=paper.self_attention,
        text_attention=paper.text_attention,
        head_channels=32,
    )
    cfg.lowres_size = 16
    cfg.training.batch_size = 16
    return cfg


def smaller_epsilon():
    """The same, in a process whose GroupNorms add 1e-6 to the variance."""
    layers.GroupNorm = functools.partial(layers.GroupNorm, epsilon=1e-6)
    return deep()
