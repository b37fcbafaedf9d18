"""Averaged parameters on disk: in a checkpoint, or in safetensors files."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax import traverse_util

from imagen_jax import config as config_lib
from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.files import find_tensors, open_tensors, read_index, read_json
from imagen_jax.models import network
from imagen_jax.stores import check_store
from imagen_jax.training import checksums
from imagen_jax.training.checkpoint import SAMPLED, Checkpointer, described_stage

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Averaged parameters that are not loaded yet."""

    path: str  # a workdir, a folder of `export` or a .safetensors file
    cfg: StageConfig | None  # None for a file, which does not name its stage
    step: int | None  # of the checkpoint; None for a file
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter, by its dotted name
    files: Mapping[str, epath.Path]  # of every parameter; empty for a workdir
    # 12 hexadecimal digits by which these weights are known: `export` keeps those of
    # the checkpoint.
    digest: str = ""

    def load(self, like: Any) -> Any:
        """The parameters, cast and placed like the abstract arrays of `like`."""
        if not self.files:
            # On devices of this process: the others may be loading something else.
            alone = all(x.sharding.is_fully_addressable for x in jax.tree.leaves(like))
            with contextlib.closing(Checkpointer(self.path, alone=alone)) as opened:
                return opened.ema(like, self.step)
        flat = traverse_util.flatten_dict(like, sep=".")
        placed = {name: self._read(name, leaf) for name, leaf in flat.items()}
        return traverse_util.unflatten_dict(placed, sep=".")

    def _read(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        with open_tensors(self.files[name]) as file:
            array = file.get_tensor(name).astype(leaf.dtype, copy=False)
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: array[index]
        )

    def check_fit(self, cfg: StageConfig, what: str) -> None:
        """Raises `UserError` unless they, given as `what`, fit the stage `cfg`."""
        want, have = _shapes(cfg), self.shapes
        wrong = [
            f"{name}: {have.get(name, 'missing')} -> {want.get(name, 'none')}"
            for name in sorted({*want, *have})
            if want.get(name) != have.get(name)
        ]
        if wrong:
            changes = self.differences(cfg, ("model.", "text.", "lowres_size"))
            changes = [f"config.{change}" for change in changes]
            raise UserError(
                f"{what}: {len(wrong)} parameters of {self.path} do not fit this stage "
                f"(there -> here): {', '.join(changes + wrong[:3])}"
            )

    def differences(self, cfg: StageConfig, groups: tuple[str, ...]) -> list[str]:
        """Lines "model.dropout: 0.0 -> 0.1" for what differs in the stage `cfg`."""
        lines = config_lib.difference(self.cfg, cfg) if self.cfg else []
        return [line for line in lines if line.startswith(groups)]


def open_weights(path: str, most: int | None = None) -> Weights:
    """The weights in a workdir, in a folder of `export` or in a .safetensors file.

    Of a workdir the newest checkpoint, or the newest up to the step `most`. Raises
    `UserError` when `path` is none of them, or damaged.
    """
    check_store(path)
    folder = epath.Path(path)
    if path.endswith(".safetensors"):
        return Weights(path, None, None, *find_tensors([folder]))
    if not (folder / CONFIG).exists():
        raise UserError(
            f"{path} has no {CONFIG}: give the --workdir of `train` or the --output of "
            "`export`"
        )
    single, index = folder / SINGLE, folder / INDEX
    if not single.exists() and not index.exists():
        with contextlib.closing(Checkpointer(path)) as checkpointer:
            step = checkpointer.required(SAMPLED, most)
            cfg = checkpointer.stage(step)
        known = _digest(checksums.read(folder / "checkpoints" / str(step)))
        return Weights(path, cfg, step, _shapes(cfg), {}, known)
    described = read_json(folder / CONFIG, "the config.json of an export")
    cfg, step = described_stage(described, str(folder / CONFIG)), described.get("step")
    if type(step) is not int:
        raise UserError(f"{folder / CONFIG} names no step: copy it again")
    files = [single]
    if not single.exists():
        files = [folder / name for name in read_index(index, "the index of an export")]
    # Older exports name no digest.
    known = str(described.get("digest") or _digest(described))
    return Weights(path, cfg, step, *find_tensors(files), known)


def _digest(known: Any) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


@functools.cache
def _shapes(cfg: StageConfig) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(network.abstract_inputs(cfg)[0], sep=".")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}
