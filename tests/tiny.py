"""The smallest stages that have everything, and batches for them."""

import dataclasses
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import config
from imagen_jax.batch import Batch, batch_spec
from imagen_jax.config import StageConfig
from imagen_jax.models import network
from imagen_jax.sharding import batch_sharding

_VALUES = {
    "image_size": 8,
    "model": {
        "channels": (8, 16),
        "num_res_blocks": (1, 1),
        "self_attention": (False, True),
        "text_attention": (False, True),
        "head_channels": 8,
        "dtype": "float32",
    },
    "diffusion": {"text_dropout": 0.25},
    "text": {"length": 4, "dim": 8, "encoder": "fake@1"},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 100},
    "training": {
        "batch_size": 8,
        "steps": 4,
        "log_every_steps": 2,
        "sample_every_steps": 0,
        "checkpoint_every_steps": 2,
    },
    "sampler": {"steps": 2, "batch_size": 8},
}

# A network for tests of what is around it: without attention, and with the mean of the
# text only, it compiles in a quarter of the time.
ONE_LEVEL = {
    "channels": (8,),
    "num_res_blocks": (1,),
    "self_attention": (False,),
    "text_attention": (False,),
    "text_conditioning": "mean_pool",
}


def stage(**changes) -> StageConfig:
    """A base from text to 8 pixels; groups in `changes` are merged into its values."""
    values = {**_VALUES}
    for name, change in changes.items():
        values[name] = (
            {**values.get(name, {}), **change} if type(change) is dict else change
        )
    return config.from_dict(values)


def sr_stage(**changes) -> StageConfig:
    """A super-resolution stage from 8 to 16 pixels."""
    model = {"architecture": "efficient_unet", **changes.pop("model", {})}
    return stage(name="sr", image_size=16, lowres_size=8, model=model, **changes)


def params(cfg: StageConfig):
    """Parameters as large as fresh ones, none of which is zero; nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        normal = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            drawn = normal * math.prod(leaf.shape[:-1]) ** -0.5
        else:
            drawn = (path[-1].key == "scale") + 0.1 * normal
        return drawn.astype(leaf.dtype)

    shapes = nn.unbox(network.abstract_params(cfg))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@dataclasses.dataclass(frozen=True)
class Untrained:
    """`Weights` of a stage that has only been initialised."""

    path: str
    cfg: StageConfig
    step: int = 3
    digest: str = "0123456789ab"

    def load(self, like):
        return jax.tree.map(
            lambda a, place: jax.device_put(a, place.sharding), params(self.cfg), like
        )


def untrained(**changes) -> list[Untrained]:
    """A cascade for captions, of 8 and 16 pixels, in batches of two."""
    text = {"length": 6, "dim": 64, "encoder": "tiny@v2-seed0-2x64"}
    groups = {"text": text, "model": ONE_LEVEL, "sampler": {"batch_size": 2}}
    base, sr = stage(**groups), sr_stage(**(groups | changes))
    return [Untrained("base", base), Untrained("sr", sr)]


def batch(cfg: StageConfig, seed: int = 0) -> Batch:
    """Random examples on the host; the caption lengths differ."""
    rng = np.random.default_rng(seed)
    spec = batch_spec(cfg)
    rows, length, _ = spec.text.shape
    mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    text = rng.normal(size=spec.text.shape) * mask[..., None]
    return Batch(
        image=rng.integers(0, 256, spec.image.shape, dtype=np.uint8),
        text=text.astype(jnp.bfloat16),
        mask=mask,
        id=np.arange(rows, dtype=np.int32) + seed * rows,
    )


class Batches(Iterator):
    """An endless source whose n-th batch is `batch(cfg, n)`."""

    def __init__(self, cfg, mesh):
        self.cfg, self.mesh, self.taken = cfg, mesh, 0
        self.hook = lambda taken: None

    def __next__(self) -> Batch:
        self.taken += 1
        self.hook(self.taken)
        found = batch(self.cfg, self.taken - 1)
        return jax.device_put(found, batch_sharding(self.mesh))

    def get_state(self) -> bytes:
        return str(self.taken).encode()

    def set_state(self, state: bytes) -> None:
        self.taken = int(state)


def with_steps(cfg: StageConfig, steps: int) -> StageConfig:
    """The same stage, trained for `steps`."""
    return dataclasses.replace(
        cfg, training=dataclasses.replace(cfg.training, steps=steps)
    )
