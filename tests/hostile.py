"""Files as a stranger might write them, and what must become of each."""

import copy
import functools
import io
import json
import os
import pathlib
import tempfile
import time
import zipfile

import numpy as np
from hypothesis import strategies as st

from imagen_jax.cli import peak_memory_gib
from imagen_jax.data import memory
from imagen_jax.data.manifest import Manifest, read_manifest, to_json
from imagen_jax.errors import UserError
from imagen_jax.text import embeddings

_KEPT = tempfile.TemporaryDirectory()
PLACE = pathlib.Path(_KEPT.name)
# Of the processor, that the slowest reading so far has taken, and any may take.
SLOWEST, MOST_SECONDS = [0.0], 5
# Words in a JSON text that stand for what `json.dumps` does not write.
RAW = {
    **{f"deep {n}": "[" * n + "]" * n for n in (14, 100, 400, 900, 990, 100_000)},
    "nines": "9" * 5000,
    "huge": "1" + "0" * 400,
    "overflow": "-1e999",
}
VALUES = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**300, -0.5, 1e300),
    *(float("nan"), float("inf"), "", "x", "nan", "8", "1e9", "²", "\ud800", "a\0b"),
    *("..", "../x", "/etc/passwd", "x/../../y", "int8", "config/../../x", "x" * 10**5),
    *([], {}, [[]], [{}], {"a": 1}, [1, "2"], {"8": 6}, {"-1": 2}, {"8": "6"}),
    *RAW,
]
KEYS = ["colour", "", "..", "8", "-8", "²", "config/a\0b", "config/../secret"]
HEADERS = [
    "{'descr': '|O', 'fortran_order': False, 'shape': (6,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3), }",
    "{'descr': '<U99999999', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<U999999999999', 'fortran_order': False, 'shape': (6,), }",
    "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (6,), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",), }",
    "__import__('os').abort()",
    "(" * 5000,
    "",
]


def folder(name: str) -> pathlib.Path:
    """An empty folder for files of one kind."""
    return pathlib.Path(tempfile.mkdtemp(prefix=f"{name}_", dir=_KEPT.name))


def outcome(read):
    """What `read` returns; None for one error that a user can read, in time."""
    begun, found = time.process_time(), None
    try:
        found = read()
    except UserError as error:
        assert 10 < len(str(error)) < 10_000
    SLOWEST[0] = max(SLOWEST[0], seconds := time.process_time() - begun)
    assert seconds < MOST_SECONDS
    return found


@functools.cache
def records() -> tuple[dict, str]:
    """The arrays and the manifest of six small pictures, as `prepare` writes them."""
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (6, 8, 8, 3), np.uint8))
    text = [embeddings.to_bytes(rng.normal(size=(n, 4))) for n in (1, 2, 3, 1, 2, 4)]
    arrays = memory.arrays(images, text, [3, 1, 4, 15, 9, 2], 8)
    shard = {"file": "arrays", "examples": 6, "sha256": memory.sha256(arrays)}
    shard |= {"sides": {"8": 6}}
    manifest = Manifest(
        settings={"source": "folder:x", "text_length": 8, "max_aspect": 0.0},
        encoder="tiny@1",
        text_dim=4,
        embedding_dtype="bfloat16",
        cosine_error={"mean": 0.0, "worst": 1e-5},
        examples=6,
        text_bytes=sum(map(len, text)),
        image_bytes=900,
        skipped=1,
        skipped_files=[{"file": "a.png", "reason": "it is empty"}],
        shards=[shard],
    )
    captions = np.array([f"picture {i}" for i in range(6)])
    return arrays | {"caption": captions}, to_json(manifest)


def read_records(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file of records, as training reads them."""
    return memory.read(str(path), read_manifest(path))


def npy(array: np.ndarray) -> bytes:
    """The file of an array in a .npz file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED):
    """The bytes of a .npz file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def reset_peak() -> float:
    """Lets the most memory be counted anew, where Linux can; what is held, in GiB."""
    if os.path.exists("/proc/self/clear_refs"):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_gib()


_EDIT = st.tuples(
    st.sampled_from(["flip", "flip", "zero", "insert", "remove", "cut"]),
    st.integers(0, 2**30),
    st.integers(1, 40),
)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """`data` with a few bytes changed, put in or taken out."""
    for kind, place, size in draw(st.lists(_EDIT, min_size=1, max_size=4)):
        data = bytearray(data)
        # Half of the edits near the end, where a zip file has its directory.
        place = place % (len(data) + 1)
        if size % 2:
            place = max(0, len(data) - place % 800)
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << size % 8
        elif kind == "zero":
            data[place : place + size] = bytes(size)
        elif kind == "insert":
            data[place:place] = bytes(range(size))
        elif kind == "remove":
            del data[place : place + size]
        elif kind == "cut":
            del data[place:]
    return bytes(data)


def _places(values, path=()):
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items):
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))
        else:
            yield (*path, key)


@st.composite
def hostile_json(draw, text: str) -> bytes:
    """A JSON text with other values, without some, or damaged."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(text.encode()))
    values = {"": json.loads(text)}
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from([p for p in _places(values) if p]))
        inside = functools.reduce(lambda inner, key: inner[key], path, values)
        action = draw(st.sampled_from(["set", "set", "set", "remove", "add"]))
        value = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if action == "set":
            inside[key] = value
        elif action == "remove" and path:
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(KEYS))] = value
    written = json.dumps(values[""])
    for word, raw in RAW.items():
        written = written.replace(json.dumps(word), raw)
    return written.encode()


def changed(array: np.ndarray, how: int, draw) -> np.ndarray | None:
    """Another array in place of one; None is to leave it out."""
    flat = array.ravel()
    match how:
        case 0:
            return None
        case 1 if array.dtype.kind == "U":
            return array.astype(draw(st.sampled_from(["|S9", "O", "<U3"])))
        case 1:
            kinds = ["<f4", "<f8", "<i2", ">i8", "<u8", "|b1", "<U9", "|S3", "<c8", "O"]
            return array.astype(draw(st.sampled_from(kinds)))
        case 2:
            return draw(st.sampled_from([flat, flat[:0], array[None], array[:-1]]))
        case 3:
            return np.concatenate([array, array])
        case 4:
            return np.asfortranarray(array)
        case 5 if array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            most, least = min(limits.max, 2**62), max(limits.min, -(2**62))
            value = draw(st.sampled_from([0, 1, most, least, min(10**9, most)]))
            out = array.copy()
            out.flat[draw(st.integers(0, array.size - 1))] = value
            return out
        case 5:
            return (
                (array.view(np.uint8) * 2).view(bool) if array.dtype == bool else None
            )
        case 6:
            return np.full(array.shape, np.nan, "f4")
    return array


@st.composite
def crafted(draw, arrays: dict[str, np.ndarray], manifest: str = "") -> tuple:
    """`(data, arrays)`: a .npz file that a stranger made, and what it holds."""
    arrays, members = dict(arrays), []
    name = draw(st.sampled_from(sorted(arrays)))
    new = changed(arrays[name], draw(st.integers(0, 8)), draw)
    del arrays[name]
    if new is not None:
        arrays[name] = new
    if manifest:
        # Strangers can compute hashes too.
        hashed = {n: a for n, a in arrays.items() if n != "caption"}
        values = json.loads(manifest)
        if not any(a.dtype.kind == "O" for a in hashed.values()):
            values["shards"][0]["sha256"] = memory.sha256(hashed)
        text = json.dumps(values)
        if draw(st.integers(0, 3)) == 0:
            text = draw(hostile_json(text)).decode("utf8", "replace")
        members.append(("manifest", npy(np.array(text))))
    members += [(name, npy(array)) for name, array in arrays.items()]
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(members) - 1))
        name, data = members[place]
        header = draw(st.sampled_from(HEADERS)).encode() + b"\n"
        start = b"\x93NUMPY" + draw(st.sampled_from([b"\1\0", b"\2\0", b"\7\1"]))
        start += len(header).to_bytes(2, "little") + header
        data = draw(st.sampled_from([start + data, data + b"more", data[:-1]]))
        members[place] = name, data
    if draw(st.integers(0, 7)) == 0:
        members.append(draw(st.sampled_from([*members, ("..//x", b""), ("x", b"")])))
    methods = [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2]
    data = zipped(members, draw(st.sampled_from([*methods, zipfile.ZIP_LZMA])))
    if draw(st.integers(0, 7)) == 0:
        # The bit of encrypted files, in the directory.
        place = data.rindex(b"PK\1\2") + 8
        data = data[:place] + b"\1" + data[place + 1 :]
    return data, arrays
