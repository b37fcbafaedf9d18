"""T5 checkpoints as others wrote them, read one tensor at a time.

A checkpoint has

  kind: "safetensors" or "t5x", which names and lays out the tensors its own way.
  shapes: of every tensor by its name in the file.
  read(name) -> its numbers as numpy; the only thing held is that tensor.
"""

import json
import pathlib

import numpy as np
from flax import serialization, traverse_util

from imagen_jax.errors import UserError

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def open_checkpoint(path: str) -> "Safetensors | T5X":
    """The checkpoint at `path`.

    Args:
      path: a folder with Hugging Face's model.safetensors, one file or several with
        an index; a .safetensors file; or T5X's folder, which holds `checkpoint`.

    Raises:
      UserError: when it is none of them, or not whole.
    """
    place = existing(path)
    if place.is_file() and place.name == "checkpoint":
        place = place.parent
    if place.is_file():
        if place.name.endswith(".index.json"):
            return Safetensors(place.parent, _indexed_files(place))
        if place.suffix == ".safetensors":
            return Safetensors(place.parent, [place.name])
    elif (place / "checkpoint").is_file():
        return T5X(place)
    elif (place / _INDEX).is_file():
        return Safetensors(place, _indexed_files(place / _INDEX))
    elif (place / _SINGLE).is_file():
        return Safetensors(place, [_SINGLE])
    raise UserError(
        f"{path!r} holds no T5 weights that are known here: give a folder with "
        f"{_SINGLE} or {_INDEX} (Hugging Face) or with a file `checkpoint` (T5X)"
        + _other_weights(place)
    )


def existing(path: str) -> pathlib.Path:
    """The file or folder of weights.

    Raises:
      UserError: when there is none.
    """
    if "://" in path:
        raise UserError(
            f"weights are read from a disk, not from {path!r}: copy them first "
            "(docs/text_encoders.md has the command)"
        )
    place = pathlib.Path(path)
    if not place.exists():
        raise UserError(f"there are no weights at {path!r}")
    return place


def _other_weights(place: pathlib.Path) -> str:
    steps = sorted(p.parent.name for p in place.glob("checkpoint_*/checkpoint"))
    if steps:
        return f"; one is in {steps[-1]!r} below it"
    if place.is_dir() and any(place.glob("*.bin")):
        return (
            "; it has PyTorch's .bin files, from which transformers' "
            "save_pretrained makes safetensors (docs/text_encoders.md)"
        )
    return ""


def _indexed_files(index: pathlib.Path) -> list[str]:
    try:
        files = sorted(set(json.loads(index.read_text("utf8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{str(index)!r} is damaged: copy it again") from None
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{str(index)!r} names {len(files)} files, of which {len(missing)} are not "
            f"there, first {missing[0]!r}: copy it again"
        )
    return files


class Safetensors:
    """Files of the safetensors package, as transformers writes them."""

    kind = "safetensors"

    def __init__(self, folder: pathlib.Path, files: list[str]):
        self._files, self.shapes = {}, {}
        for name in files:
            path = folder / name
            with _opened(path) as file:
                for tensor in file.keys():
                    part = file.get_slice(tensor)
                    self._files[tensor] = path, part.get_dtype()
                    self.shapes[tensor] = tuple(part.get_shape())

    def read(self, name: str) -> np.ndarray:
        """`shapes[name]` of floats.

        Raises:
          UserError: when the file is damaged or holds the tensor quantised.
        """
        path, dtype = self._files[name]
        if dtype not in _FLOATS:
            raise UserError(
                f"{name!r} in {str(path)!r} is stored as {dtype}; weights are read as "
                f"{', '.join(_FLOATS)} only: take a copy that is not quantised"
            )
        # Opened for each tensor: what is read of a mapped file counts as memory held
        # until it is closed.
        with _opened(path) as file:
            return file.get_tensor(name)


def _opened(path: pathlib.Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is no safetensors file, or is damaged ({error}): copy it "
            "again"
        ) from None


class T5X:
    """A folder of T5X: `checkpoint` (msgpack) and a zarr array for each tensor.

    Source: t5x/checkpoints.py. The msgpack file holds a nested dict; a leaf is an
    array, or says in which folder it lies: as the spec of a tensorstore, whose path
    stands in its kvstore or, before tensorstore 0.1.14, beside it, or as
    "PLACEHOLDER://FOLDER" where Orbax wrote it.
    """

    kind = "t5x"

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        try:
            tree = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
            tree = tree.get("optimizer", tree)
            target = {"target": tree["target"]}
        except Exception as error:  # msgpack raises what its C code comes upon.
            raise UserError(
                f"{str(folder / 'checkpoint')!r} is no checkpoint of T5X, or is "
                f"damaged ({type(error).__name__}: {error}): copy it again"
            ) from None
        leaves = traverse_util.flatten_dict(
            target, sep=".", is_leaf=lambda _, value: set(value) >= {"driver"}
        )
        # The decoder is of no use here; its folders need not have been copied.
        self._leaves = {k: v for k, v in leaves.items() if ".decoder." not in k}
        self._stores, self.shapes = {}, {}
        for name, leaf in self._leaves.items():
            place = _folder_of(leaf)
            if place is None:
                self.shapes[name] = np.shape(leaf)
            elif (folder / place / ".zarray").is_file():
                self._stores[name] = self._open(folder / place)
                self.shapes[name] = tuple(self._stores[name].shape)

    def _open(self, place: pathlib.Path):
        import tensorstore

        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{place.resolve()}/"},
            # A chunk that was not copied would be read as zeros.
            "fill_missing_data_reads": False,
        }
        # Few chunks at once, none kept: each is held compressed and decoded.
        context = tensorstore.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "data_copy_concurrency": {"limit": 4},
                "file_io_concurrency": {"limit": 4},
            }
        )
        try:
            return tensorstore.open(spec, context=context, read=True).result()
        except ValueError as error:
            raise UserError(_damaged(place, error)) from None

    def read(self, name: str) -> np.ndarray:
        """`shapes[name]` of floats.

        Raises:
          UserError: when a part of it is damaged or was not copied.
        """
        if name not in self._stores:
            return np.asarray(self._leaves[name])
        import tensorstore

        store = self._stores[name]
        out = np.empty(store.shape, store.dtype.numpy_dtype)
        try:
            # Into memory of ours: tensorstore's threads keep for themselves what they
            # allocated and freed.
            tensorstore.array(out, copy=False).write(store).result()
            return out
        except ValueError as error:
            place = self._folder / _folder_of(self._leaves[name])
            raise UserError(_damaged(place, error)) from None


def _folder_of(leaf) -> str | None:
    """The folder of a leaf's zarr array; None for an array in the msgpack file."""
    if isinstance(leaf, str):
        return leaf.removeprefix("PLACEHOLDER://")
    if isinstance(leaf, dict):
        return (leaf["kvstore"].get("path") or leaf["path"]).strip("/")
    return None


def _damaged(place: pathlib.Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{str(place)!r} is damaged or was copied in part ({reason}): copy it again"
