"""Averaged parameters as safetensors: a folder to publish, and to start from.

It holds model.safetensors (or several files and an index, as Hugging Face names them),
config.json (the stage) and README.md (the model card). A folder that others made may
hold anything: what is read is JSON and safetensors, from regular files in that folder.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from imagen_jax import config as config_lib
from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.training.checkpoint import check_version, description

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
CARD = "README.md"

_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# Far more than any network needs, and soon read.
_CONFIG_BYTES = 2**20
_INDEX_BYTES = 2**26


def is_exported(path: str | os.PathLike) -> bool:
    """Whether `path` is a .safetensors file or a folder of `write`."""
    place = pathlib.Path(path)
    return place.suffix == ".safetensors" or any(
        os.path.lexists(place / name) for name in (SINGLE, INDEX)
    )


def write(
    folder: str, params, cfg: StageConfig, step: int, card: str, shard_bytes: int
) -> list[str]:
    """Writes parameters that other programs can read, too; all of it or nothing.

    Args:
      folder: made by this; on a disk.
      params: averaged parameters.
      cfg: of the stage. Where its records and first weights lay is left out.
      step: of the checkpoint.
      card: text of README.md.
      shard_bytes: of the parameters in one file, at most (but for a single larger one).

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
    shards = _shards(
        {k: v.size * v.dtype.itemsize for k, v in flat.items()}, shard_bytes
    )
    count = len(shards)
    files = [SINGLE]
    if count > 1:
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    partial = place.with_name(place.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for file, names in zip(files, shards, strict=True):
            arrays = {name: np.asarray(flat[name]) for name in names}
            safetensors.numpy.save_file(arrays, partial / file, {"format": "flax"})
        if count > 1:
            pairs = zip(files, shards, strict=True)
            where = {name: file for file, names in pairs for name in names}
            total = sum(leaf.size * leaf.dtype.itemsize for leaf in flat.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        described = json.dumps(description(_published(cfg), step), indent=2)
        (partial / CONFIG).write_text(described + "\n")
        (partial / CARD).write_text(card)
        if place.exists():
            place.rmdir()
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    return files


def _published(cfg: StageConfig) -> StageConfig:
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, records=""),
        training=dataclasses.replace(cfg.training, init_from=""),
    )


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, cut where a file would become larger than `most`."""
    shards, held = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


class Exported:
    """Parameters in safetensors files.

    Attributes:
      path: as it was given.
      cfg: of the stage; None for a single file, which does not say.
      step: of the checkpoint that was exported; None for a single file.
      shapes: of every parameter by its dotted name.
    """

    def __init__(self, path: str):
        """Opens a folder of `write`, or a single .safetensors file.

        Raises:
          UserError: when it is neither, is damaged, or leads out of its folder.
        """
        self.path, self.cfg, self.step = path, None, None
        place = pathlib.Path(path)
        if place.suffix == ".safetensors":
            place, files = place.parent, [place.name]
        else:
            self.cfg, self.step = _read_config(place)
            files = [SINGLE]
            if not os.path.lexists(place / SINGLE):
                files = _indexed(place)
        self._files, self.shapes = {}, {}
        for name in files:
            file = _regular(place, name)
            with _opened(file) as opened:
                for tensor in opened.keys():
                    part = opened.get_slice(tensor)
                    if part.get_dtype() not in _FLOATS:
                        raise UserError(
                            f"{tensor!r} in {file} is stored as {part.get_dtype()}; "
                            f"parameters are read as {', '.join(_FLOATS)} only"
                        )
                    self._files[tensor] = file
                    self.shapes[tensor] = tuple(part.get_shape())

    def load(self, like):
        """The parameters as float32, where the abstract arrays of `like` say.

        Raises:
          UserError: for values that are not finite.
        """
        flat = traverse_util.flatten_dict(like, sep=".")
        placed = {name: self._read(name, leaf) for name, leaf in flat.items()}
        return traverse_util.unflatten_dict(placed, sep=".")

    def _read(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        with _opened(self._files[name]) as file:
            array = file.get_tensor(name).astype(leaf.dtype, copy=False)
        if not np.isfinite(array).all():
            raise UserError(
                f"{name!r} in {self._files[name]} holds values that are inf or NaN: "
                "take another copy"
            )
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: array[index]
        )


def _read_config(folder: pathlib.Path) -> tuple[StageConfig, int]:
    path = _regular(folder, CONFIG, _CONFIG_BYTES)
    found = _json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what `export` writes")
    check_version(found.get("schema_version"), str(path))
    stage, step = found.get("stage"), found.get("step")
    if type(step) is not int or not isinstance(stage, dict):
        raise UserError(f"{path} is not what `export` writes: no stage, or no step")
    return config_lib.from_json(stage, str(path)), step


def _indexed(folder: pathlib.Path) -> list[str]:
    path = _regular(folder, INDEX, _INDEX_BYTES)
    found = _json(path)
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where:
        raise UserError(f"{path} names no files: copy it again")
    for file in where.values():
        if not (isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file)):
            raise UserError(
                f"{path} names the file {file!r}; only .safetensors files beside it "
                "are read"
            )
    return sorted(set(where.values()))


def _json(path: pathlib.Path):
    try:
        return json.loads(path.read_text("utf8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _regular(folder: pathlib.Path, name: str, most: float = math.inf) -> pathlib.Path:
    """`folder/name` when it is a file of its own there, of at most so many bytes."""
    path = folder / name
    try:
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(
            f"{path} is no regular file (a link, pipe or folder): only files that lie "
            "in the folder itself are read; copy it there"
        )
    if found.st_size > most:
        raise UserError(f"{path} has {found.st_size} bytes, more than is plausible")
    return path


def _opened(path: pathlib.Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no safetensors file, or is damaged ({error}): copy it again"
        ) from None
