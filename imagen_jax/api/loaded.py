"""What a cascade keeps in memory between calls: weights, text encoder, embeddings."""

import functools
import math
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from imagen_jax.api.cascade import IN_MEMORY, Texts, load
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.cascade import Stage
from imagen_jax.text.encoders import TextEncoder, load_encoder
from imagen_jax.training.state import abstract_state
from imagen_jax.training.weights import Weights


class Loaded:
    """Stages and text encoder of a cascade, loaded when they are needed.

    They stay while the weights of all stages take at most half of a device's memory, or
    of the system's on CPUs; else one stage is there at a time. The encoder stays if it
    fits too; else it leaves before a stage comes, and stages before it does.
    """

    def __init__(self, trained: Sequence[Weights], encoder_weights: str, mesh: Mesh):
        """Loads nothing yet."""
        self.mesh = mesh
        self._trained = trained
        self._encoder_weights = encoder_weights
        self._encoder: TextEncoder | None = None
        self._crowded = False  # whether the encoder has no room beside the stages
        self._texts = Texts(trained[0].cfg.text)
        self._stages: dict[int, Stage] = {}

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`[N, L, D]` bfloat16 and the mask `[N, L]` of N prompts."""
        if self._texts.missing(prompts):
            if self._texts.nbytes > IN_MEMORY:
                self._texts = Texts(self._trained[0].cfg.text)
            self._texts.add(self._open_encoder(), prompts)
        return self._texts(prompts)

    def embedded(self, prompts: Sequence[str], folder: pathlib.Path) -> Texts:
        """The texts of a whole job, in a file of `folder`; frees the encoder."""
        texts = Texts(self._trained[0].cfg.text, folder)
        texts.add(self._open_encoder(), prompts)
        self._encoder = None
        return texts

    def stage(self, number: int, cfg: StageConfig) -> Stage:
        """A stage with its weights on the mesh, to be sampled as `cfg` says."""
        if self._crowded:
            self._encoder = None
        if number not in self._stages:
            if self._nbytes > _room(self.mesh):
                self._stages.clear()
            self._stages[number] = load(self._trained[number], self.mesh)
        return self._stages[number].replace(cfg=cfg)

    @functools.cached_property
    def _nbytes(self) -> int:
        """What the weights of all stages take on a device."""
        params = [abstract_state(one.cfg, self.mesh).ema for one in self._trained]
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(params)
        )

    def _open_encoder(self) -> TextEncoder:
        if self._encoder is None:
            if self._crowded:
                self._stages.clear()
            name = self._trained[0].cfg.text.encoder
            self._encoder = load_encoder(name, self._encoder_weights)
            taken = self._encoder.nbytes + self._nbytes
            self._crowded = taken > _room(self.mesh)
        return self._encoder


def _room(mesh: Mesh) -> float:
    """Bytes of a device that weights may take; the rest is for activations."""
    devices = mesh.local_devices
    total = (devices[0].memory_stats() or {}).get("bytes_limit")
    if not total:  # CPUs share the system's
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    return total / 2
