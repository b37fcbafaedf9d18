"""Settings that a stage could be trained with, and a quick guess of each.

A guess needs no compiler, only shapes. It says which settings are worth compiling.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax.config import MeshConfig, StageConfig, TrainingConfig
from imagen_jax.models import network
from imagen_jax.planning.chips import Chip
from imagen_jax.planning.compile import abstract_batch
from imagen_jax.planning.flops import forward_flops
from imagen_jax.planning.report import shard_gib
from imagen_jax.sharding import on_mesh, row_shards
from imagen_jax.training.state import abstract_state

_GIB = 2**30
REMAT = ("none", "activations", "blocks")
# Share of a forward pass that each policy does again.
_AGAIN = {"none": 0.0, "activations": 0.0, "blocks": 1.0}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a plan may change without changing what is learnt.

    Attributes:
      axes: sizes of the mesh's axes, as pairs.
      microbatches: see `TrainingConfig`.
      remat: see `ModelConfig`.
    """

    axes: tuple[tuple[str, int], ...]
    microbatches: int
    remat: str

    @classmethod
    def of(cls, cfg: StageConfig, mesh: Mesh) -> "Setting":
        """The setting of a config on a mesh that is made."""
        axes = tuple(mesh.shape.items())
        return cls(axes, cfg.training.microbatches, cfg.model.remat)

    def apply(self, cfg: StageConfig) -> StageConfig:
        """`cfg` with this setting.

        Raises:
          UserError: for one that cannot be.
        """
        return dataclasses.replace(
            cfg,
            mesh=dataclasses.replace(cfg.mesh, **dict(self.axes)),
            model=dataclasses.replace(cfg.model, remat=self.remat),
            training=dataclasses.replace(cfg.training, microbatches=self.microbatches),
        )

    def flags(self, other: "Setting") -> str:
        """What to write on the command line to get from `other` to this."""
        axes = ",".join(f"{name}:{size}" for name, size in self.axes if size > 1)
        words = []
        if self.axes != other.axes:
            words.append(f"--mesh={axes or 'data:1'}")
        if self.remat != other.remat:
            words.append(f"--config.model.remat={self.remat}")
        if self.microbatches != other.microbatches:
            words.append(f"--config.training.microbatches={self.microbatches}")
        return " ".join(words)

    def text(self) -> str:
        """For a table: "data 16, fsdp 16; 2 microbatches; remat none"."""
        axes = ", ".join(f"{name} {size}" for name, size in self.axes if size > 1)
        parts = f"{self.microbatches} microbatch{'es' * (self.microbatches > 1)}"
        return f"{axes or 'one device'}; {parts}; remat {self.remat}"


@dataclasses.dataclass(frozen=True)
class Guess:
    """Of one device.

    Attributes:
      state_gib: parameters, optimizer, EMA and batch: exact, but for tiles' padding.
      step_gib: gradients and what the backward pass keeps: more than a compiler that
        fuses operations keeps.
      seconds: arithmetic at the peak rate, and exchanges of weights and gradients.
    """

    state_gib: float
    step_gib: float
    seconds: float

    @property
    def gib(self) -> float:
        """All memory."""
        return self.state_gib + self.step_gib


def settings(cfg: StageConfig, mesh: Mesh) -> Iterator[Setting]:
    """All that `--search` chooses from: data and fsdp, microbatches, remat.

    The mesh's other axes stay as they are.
    """
    here = Setting.of(cfg, mesh)
    ways = row_shards(mesh)
    rows = cfg.training.batch_size // ways
    for microbatches in (n for n in (1, 2, 4, 8, 16) if rows % n == 0):
        for remat in REMAT:
            for fsdp in (n for n in range(1, ways + 1) if ways % n == 0):
                sizes = {**dict(here.axes), "data": ways // fsdp, "fsdp": fsdp}
                yield Setting(tuple(sizes.items()), microbatches, remat)


def next_settings(cfg: StageConfig, mesh: Mesh) -> Iterator[Setting]:
    """Settings that take less memory than that of `cfg`, the nearest first.

    More fsdp comes before more remat, and that before more microbatches.
    """
    here = Setting.of(cfg, mesh)
    fsdp, stronger = dict(here.axes)["fsdp"], REMAT.index(here.remat)
    for each in settings(cfg, mesh):
        if (
            dict(each.axes)["fsdp"] >= fsdp
            and each.microbatches >= here.microbatches
            and each.microbatches % here.microbatches == 0
            and REMAT.index(each.remat) >= stronger
            and each != here
        ):
            yield each


def guess(cfg: StageConfig, mesh: Mesh, chip: Chip | None) -> Guess:
    """What a training step would take, by its shapes."""
    # What is traced is the same for all settings, but for what remat keeps.
    alike = dataclasses.replace(cfg, mesh=MeshConfig(), training=TrainingConfig())
    plain = dataclasses.replace(
        alike, model=dataclasses.replace(cfg.model, remat="none")
    )
    state = abstract_state(plain, mesh)
    weights = shard_gib(state.params)
    parts = cfg.training.microbatches
    rows = cfg.training.batch_size // row_shards(mesh) // parts
    # What is kept of a picture does not depend on where weights lie.
    shape = {**mesh.shape, "data": row_shards(mesh), "fsdp": 1}
    unsplit = Mesh(mesh.devices.reshape(tuple(shape.values())), tuple(shape))
    kept = rows * kept_bytes(alike, unsplit) / _GIB
    # Gradients; of several microbatches also their sum.
    step = weights * (2 if parts > 1 else 1) + kept
    seconds = 0.0
    if chip:
        flops, count = _weight(plain)
        forward = flops * cfg.training.batch_size / mesh.size
        seconds = forward * (3 + _AGAIN[cfg.model.remat]) / chip.flops
        seconds += _exchanged_bytes(cfg, mesh, count) / chip.link
    held = shard_gib(state) + shard_gib(abstract_batch(cfg, mesh))
    return Guess(held, step, seconds)


@functools.lru_cache
def _weight(cfg: StageConfig) -> tuple[int, int]:
    """Forward operations of a picture, and parameters."""
    leaves = jax.tree.leaves(network.abstract_inputs(cfg)[0])
    return forward_flops(cfg), sum(math.prod(leaf.shape) for leaf in leaves)


def _exchanged_bytes(cfg: StageConfig, mesh: Mesh, count: int) -> float:
    """That a device sends for weights and their gradients, both in the compute type."""
    item = jnp.dtype(cfg.model.dtype).itemsize
    fsdp, data = mesh.shape["fsdp"], mesh.shape["data"]
    own = count / mesh.shape["tensor"]
    split, copies = (fsdp - 1) / fsdp, (data - 1) / data
    passes = (2 + _AGAIN[cfg.model.remat]) * cfg.training.microbatches
    gathered = own * item * split * passes
    # Of each microbatch: sums are scattered over fsdp, and parts summed over data.
    summed = own * item * (split + 2 / fsdp * copies) * cfg.training.microbatches
    return gathered + summed


# So many pictures that what is kept of weights does not count.
_MANY = 64


@functools.lru_cache
def kept_bytes(cfg: StageConfig, mesh: Mesh) -> float:
    """What the backward pass keeps of a picture.

    As JAX has it: a compiler keeps less, as it computes cheap operations again.

    Args:
      cfg: the stage.
      mesh: decides which kernels are taken.
    """

    def residuals(params, z, logsnr, cond):
        def total(params):
            return network.apply(cfg.model, params, z, logsnr, cond).sum()

        return jax.vjp(total, params)[1]

    params, *inputs = network.abstract_inputs(cfg)
    count = _MANY * row_shards(mesh)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), inputs
    )
    kept = jax.eval_shape(on_mesh(residuals, mesh), params, *inputs)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / count
