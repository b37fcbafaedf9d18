"""Averaged parameters as safetensors: a folder to publish, and to start from.

It holds model.safetensors (or several files and an index, named as Hugging Face does),
config.json (the stage) and README.md (the model card).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError, read_json
from imagen_jax.training.checkpoint import described_stage, description

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
CARD = "README.md"

_FLOATS = ("F64", "F32", "F16", "BF16")


def is_exported(path: str | os.PathLike) -> bool:
    """Whether `path` is a .safetensors file or a folder that `write` made."""
    place = pathlib.Path(path)
    return place.suffix == ".safetensors" or any(
        (place / name).exists() for name in (SINGLE, INDEX)
    )


def write(
    folder: str, params: Any, cfg: StageConfig, step: int, card: str, shard_bytes: int
) -> list[str]:
    """Writes parameters so that other programs can read them; everything or nothing.

    Args:
      folder: a new or empty folder on a disk.
      params: averaged parameters.
      cfg: the stage, stored without the paths of its records and first weights.
      step: the checkpoint's step.
      card: text of README.md.
      shard_bytes: most bytes of parameters in one file, if it holds several.

    Returns:
      The names of the files that hold parameters.

    Raises:
      UserError: when `folder` exists and is not empty, or cannot be written.
    """
    import safetensors.numpy

    place = pathlib.Path(folder)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{folder} exists and is not empty: give a new folder")
    flat = traverse_util.flatten_dict(params, sep=".")
    sizes = {name: leaf.nbytes for name, leaf in flat.items()}
    shards = _shards(sizes, shard_bytes)
    partial = place.with_name(place.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for file, names in shards.items():
            arrays = {name: np.asarray(flat[name]) for name in names}
            safetensors.numpy.save_file(arrays, partial / file, {"format": "flax"})
        if len(shards) > 1:
            where = {name: file for file, names in shards.items() for name in names}
            total = {"total_size": sum(sizes.values())}
            _write_json(partial / INDEX, {"metadata": total, "weight_map": where})
        _write_json(partial / CONFIG, description(_published(cfg), step))
        (partial / CARD).write_text(card)
        if place.exists():
            place.rmdir()
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    return list(shards)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _published(cfg: StageConfig) -> StageConfig:
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, records=""),
        training=dataclasses.replace(cfg.training, init_from=""),
    )


def _shards(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Names by file, in their order, cut where a file would exceed `most` bytes."""
    shards, held = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


class Exported:
    """Parameters in safetensors files.

    Attributes:
      path: the folder, or the single file.
      cfg: the stage; None for a single file.
      step: the step of the exported checkpoint; None for a single file.
      shapes: the shape of every parameter by its dotted name.
    """

    def __init__(self, path: str):
        """Opens a folder that `write` made, or a single .safetensors file.

        Raises:
          UserError: when it is neither, or damaged.
        """
        self.path, self.cfg, self.step = path, None, None
        place = pathlib.Path(path)
        if place.suffix == ".safetensors":
            files = [place]
        else:
            described = read_json(place / CONFIG, "the config.json of an export")
            self.cfg = described_stage(described, str(place / CONFIG))
            self.step = described.get("step")
            files = [place / SINGLE]
            if not files[0].exists():
                index = read_json(place / INDEX, "the index of an export")
                names = index.get("weight_map", {}).values()
                files = [place / name for name in sorted(set(names))]
        self._files: dict[str, pathlib.Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with _opened(file) as opened:
                for name in opened.keys():
                    tensor = opened.get_slice(name)
                    if tensor.get_dtype() not in _FLOATS:
                        raise UserError(
                            f"{name!r} in {file} is stored as {tensor.get_dtype()}; "
                            f"parameters must be one of {', '.join(_FLOATS)}"
                        )
                    self._files[name] = file
                    self.shapes[name] = tuple(tensor.get_shape())

    def load(self, like: Any) -> Any:
        """The parameters, cast and placed like the abstract arrays of `like`."""
        flat = traverse_util.flatten_dict(like, sep=".")
        placed = {name: self._read(name, leaf) for name, leaf in flat.items()}
        return traverse_util.unflatten_dict(placed, sep=".")

    def _read(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        with _opened(self._files[name]) as file:
            array = file.get_tensor(name).astype(leaf.dtype, copy=False)
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: array[index]
        )


def _opened(path: pathlib.Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no safetensors file, or is damaged ({error}): copy it again"
        ) from None
