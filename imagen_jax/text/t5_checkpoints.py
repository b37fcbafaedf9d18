"""T5 checkpoints in the formats of transformers and T5X, read tensor by tensor.

Both readers have `kind`, "safetensors" or "t5x"; `shapes`, the shape of every tensor by
its name in the file; and `read(name)`, which keeps no other tensor in memory.
"""

import pathlib

import numpy as np
from flax import serialization, traverse_util

from imagen_jax.errors import UserError, read_json

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def open_checkpoint(path: str) -> "Safetensors | T5X":
    """The checkpoint at `path`.

    Args:
      path: a folder with Hugging Face's model.safetensors, one file or several with
        an index; a .safetensors file; or T5X's folder, which holds `checkpoint`.

    Raises:
      UserError: when it is none of them, or incomplete.
    """
    place = existing(path)
    folder, names = place, ("checkpoint", _INDEX, _SINGLE)
    if place.is_file():
        folder, names = place.parent, (place.name,)
    for file in (folder / name for name in names):
        if file.is_file() and file.name == "checkpoint":
            return T5X(folder)
        if file.is_file() and file.name.endswith(".index.json"):
            index = read_json(file, "an index of safetensors files")
            files = sorted(set(index.get("weight_map", {}).values()))
            return Safetensors([folder / name for name in files])
        if file.is_file() and file.suffix == ".safetensors":
            return Safetensors([file])
    hint = ""
    if steps := sorted(p.parent.name for p in place.glob("checkpoint_*/checkpoint")):
        hint = f"; one is in {steps[-1]!r} below it"
    elif any(place.glob("*.bin")):
        hint = (
            "; it has PyTorch's .bin files, from which transformers' "
            "save_pretrained makes safetensors (docs/text_encoders.md)"
        )
    raise UserError(
        f"{path!r} holds no T5 weights that are known here: give a folder with "
        f"{_SINGLE} or {_INDEX} (Hugging Face) or with a file `checkpoint` (T5X){hint}"
    )


def existing(path: str) -> pathlib.Path:
    """`path`, a file or folder on a disk; raises `UserError` when there is none."""
    if "://" in path:
        raise UserError(
            f"weights are read from a disk, not from {path!r}: copy them first "
            "(docs/text_encoders.md has the command)"
        )
    if not pathlib.Path(path).exists():
        raise UserError(f"there are no weights at {path!r}")
    return pathlib.Path(path)


class Safetensors:
    """Files of the safetensors package, as transformers writes them."""

    kind = "safetensors"

    def __init__(self, paths: list[pathlib.Path]):
        self._files, self.shapes = {}, {}
        for path in paths:
            with _opened(path) as file:
                for tensor in file.keys():
                    part = file.get_slice(tensor)
                    self._files[tensor] = path, part.get_dtype()
                    self.shapes[tensor] = tuple(part.get_shape())

    def read(self, name: str) -> np.ndarray:
        """Floats of shape `shapes[name]`; raises `UserError` if they are quantised."""
        path, dtype = self._files[name]
        if dtype not in _FLOATS:
            raise UserError(
                f"{name!r} in {str(path)!r} is stored as {dtype}; weights are read as "
                f"{', '.join(_FLOATS)} only: take a copy that is not quantised"
            )
        # Opened for each tensor: what was read of a mapped file counts as memory of
        # this process until the file is closed.
        with _opened(path) as file:
            return file.get_tensor(name)


def _opened(path: pathlib.Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is no safetensors file, or is missing or damaged "
            f"({error}): copy it again"
        ) from None


class T5X:
    """A folder of T5X: `checkpoint` (msgpack) and a zarr array for each tensor.

    Source: t5x/checkpoints.py. The msgpack file holds a nested dict. A leaf is an
    array or names the folder of one: as the spec of a tensorstore, whose path stands
    in its kvstore or, before tensorstore 0.1.14, beside it, or as
    "PLACEHOLDER://FOLDER" where Orbax wrote it.
    """

    kind = "t5x"

    def __init__(self, folder: pathlib.Path):
        try:
            tree = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
            target = {"target": tree.get("optimizer", tree)["target"]}
        except Exception as error:  # msgpack raises errors of many kinds.
            raise _damaged(folder / "checkpoint", error) from None
        leaves = traverse_util.flatten_dict(
            target, sep=".", is_leaf=lambda _, value: set(value) >= {"driver"}
        )
        self._leaves, self.shapes = {}, {}
        for name, leaf in leaves.items():
            # The decoder is of no use here; its folders need not have been copied.
            if ".decoder." in name:
                continue
            if isinstance(leaf, dict):
                leaf = leaf["kvstore"].get("path") or leaf["path"]
            if isinstance(leaf, str):
                place = folder / leaf.removeprefix("PLACEHOLDER://").strip("/")
                if not (place / ".zarray").is_file():
                    continue
                leaf = _open_zarr(place)
            self._leaves[name] = leaf
            self.shapes[name] = tuple(leaf.shape)

    def read(self, name: str) -> np.ndarray:
        """Floats of shape `shapes[name]`; raises `UserError` if a part is missing."""
        import tensorstore

        leaf = self._leaves[name]
        if not isinstance(leaf, tensorstore.TensorStore):
            return np.asarray(leaf)
        out = np.empty(leaf.shape, leaf.dtype.numpy_dtype)
        try:
            # Into memory of ours: tensorstore's threads keep what they allocated.
            tensorstore.array(out, copy=False).write(leaf).result()
        except ValueError as error:
            raise _damaged(leaf.kvstore.path, error) from None
        return out


def _open_zarr(place: pathlib.Path):
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{place.resolve()}/"},
        # A chunk that was not copied would be read as zeros.
        "fill_missing_data_reads": False,
    }
    # Few chunks at once, none kept: each is held compressed and decoded.
    context = {
        "cache_pool": {"total_bytes_limit": 0},
        "data_copy_concurrency": {"limit": 4},
        "file_io_concurrency": {"limit": 4},
    }
    try:
        context = tensorstore.Context(context)
        return tensorstore.open(spec, context=context, read=True).result()
    except ValueError as error:
        raise _damaged(place, error) from None


def _damaged(place, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(
        f"{str(place).rstrip('/')!r} is damaged, was copied in part or is not T5X's "
        f"({reason}): copy it again"
    )
