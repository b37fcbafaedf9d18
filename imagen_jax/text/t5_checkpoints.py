"""T5 checkpoints in the formats of transformers and T5X, read tensor by tensor."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from flax import serialization, traverse_util

from imagen_jax.errors import UserError
from imagen_jax.files import find_tensors, open_tensors, read_index


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is opened, not read."""

    kind: str  # "safetensors" or "t5x"
    shapes: dict[str, tuple[int, ...]]  # of every tensor by its name in the file
    read: Callable[[str], np.ndarray]  # one tensor by name; keeps no other in memory


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at `path`.

    A folder with Hugging Face's model.safetensors, one file or several with an index;
    a .safetensors file; or T5X's folder, which holds `checkpoint`.
    """
    place = existing(path)
    single = place / "model.safetensors"
    index = place / "model.safetensors.index.json"
    if place.suffix == ".safetensors":
        return _open_safetensors([place])
    if (place / "checkpoint").is_file():
        return _open_t5x(place)
    if index.is_file():
        files = read_index(index, "an index of safetensors files")
        return _open_safetensors([place / file for file in files])
    if single.is_file():
        return _open_safetensors([single])
    raise UserError(
        f"{path!r} holds no T5 weights: give a folder with T5X's file `checkpoint`, or "
        f"with transformers' {single.name} or {index.name} (its save_pretrained makes "
        "them of PyTorch's .bin files, see docs/text_encoders.md)"
    )


def existing(path: str) -> pathlib.Path:
    """`path`, a file or folder on a disk; raises `UserError` when there is none."""
    if not pathlib.Path(path).exists():
        raise UserError(
            f"there are no weights at {path!r}: copy them to a disk first "
            "(docs/text_encoders.md has the command)"
        )
    return pathlib.Path(path)


def _open_safetensors(paths: list[pathlib.Path]) -> Checkpoint:
    shapes, files = find_tensors(paths)

    def read(name):
        # Opened for each tensor: what was read of a mapped file counts as memory of
        # this process until the file is closed.
        with open_tensors(files[name]) as file:
            return file.get_tensor(name)

    return Checkpoint("safetensors", shapes, read)


def _open_t5x(folder: pathlib.Path) -> Checkpoint:
    """A folder of T5X: `checkpoint` (msgpack) and a zarr array for each tensor.

    Source: t5x/checkpoints.py. The msgpack file holds a nested dict. A leaf is an
    array or names the folder of one: as the spec of a tensorstore, whose path stands
    in its kvstore or, before tensorstore 0.1.14, beside it, or as
    "PLACEHOLDER://FOLDER" where Orbax wrote it.
    """
    import tensorstore

    try:
        tree = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
        target = {"target": tree.get("optimizer", tree)["target"]}
    except Exception as error:  # msgpack raises errors of many kinds.
        raise _damaged(folder / "checkpoint", error) from None
    leaves = traverse_util.flatten_dict(
        target, sep=".", is_leaf=lambda _, value: "driver" in value
    )

    def read(name):
        leaf = leaves[name]
        if not isinstance(leaf, tensorstore.TensorStore):
            return np.asarray(leaf)
        out = np.empty(leaf.shape, leaf.dtype.numpy_dtype)
        try:
            # Into memory of ours: tensorstore's threads keep what they allocated.
            tensorstore.array(out, copy=False).write(leaf).result()
        except ValueError as error:
            raise _damaged(leaf.kvstore.path, error) from None
        return out

    shapes = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, dict):
            leaf = leaf["kvstore"].get("path") or leaf["path"]
        if isinstance(leaf, str):
            place = folder / leaf.removeprefix("PLACEHOLDER://").strip("/")
            # The decoder is of no use here; its folders need not have been copied.
            if ".decoder." in name or not (place / ".zarray").is_file():
                continue
            leaf = leaves[name] = _open_zarr(place)
        shapes[name] = tuple(leaf.shape)
    return Checkpoint("t5x", shapes, read)


def _open_zarr(place: pathlib.Path):
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{place.resolve()}/"},
        # A chunk that was not copied would be read as zeros.
        "fill_missing_data_reads": False,
        # Few chunks at once, none kept: each is held compressed and decoded.
        "context": {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 4},
            "file_io_concurrency": {"limit": 4},
        },
    }
    try:
        return tensorstore.open(spec, read=True).result()
    except ValueError as error:
        raise _damaged(place, error) from None


def _damaged(place: pathlib.Path | str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(f"{str(place)!r} is missing or damaged ({reason}): copy it again")
