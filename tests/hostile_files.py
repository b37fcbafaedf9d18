"""Certain files of strangers: JSON and its readers, .npz files, large files."""

import io
import json
import zlib

import jax
import numpy as np
import safetensors.numpy

from imagen_jax import config
from imagen_jax.data import memory, pipeline
from imagen_jax.sharding import make_mesh
from imagen_jax.training import checksums, loop, replay, weights
from imagen_jax.training.checkpoint import Checkpointer, description
from tests import hostile, tiny

CFG = tiny.stage(model=tiny.ONE_LEVEL)


def npz_manifest(folder):
    """Inside of a .npz file."""
    arrays, text = hostile.records()
    members = [(name, hostile.npy(array)) for name, array in arrays.items()]

    def read():
        own = np.array((folder / "text").read_text(errors="replace"))
        data = hostile.zipped([*members, ("manifest", hostile.npy(own))])
        (folder / "x.npz").write_bytes(data)
        return hostile.read_records(folder / "x.npz")

    return folder / "text", text, read


def folder_manifest(folder):
    for name in ("dataset_info.json", "features.json", "a.tfrecord"):
        (folder / name).touch()
    manifest = json.loads(hostile.records()[1])
    manifest["shards"][0]["file"] = "a.tfrecord"
    records = {"data": {"records": f"{folder}:1,{folder}:2"}, "text": {}}
    cfg = config.from_dict(json.loads(config.to_json(CFG)) | records)

    def read():
        _, sources = pipeline.open_sources(cfg)
        assert [pipeline._usable(cfg, own) for own in sources] == [[6], [6]]
        return [source.manifest.content_sha256 for source in sources]

    return folder / "manifest.json", json.dumps(manifest), read


def export_index(folder):
    (folder / weights.CONFIG).write_text(json.dumps(description(CFG, 4)))
    files = {name: f"{name}.safetensors" for name in "ab"}
    for name, file in files.items():
        safetensors.numpy.save_file({name: np.ones(3, "f4")}, folder / file)
    index = json.dumps({"metadata": {"total_size": 24}, "weight_map": files})
    return folder / weights.INDEX, index, lambda: weights.open_weights(str(folder))


def export_config(folder):
    safetensors.numpy.save_file({"a": np.ones(3, "f4")}, folder / weights.SINGLE)

    def read():
        found = weights.open_weights(str(folder))
        assert type(found.step) is int and isinstance(found.cfg, config.StageConfig)
        return found

    return folder / weights.CONFIG, json.dumps(description(CFG, 4)), read


def workdir_config(folder):
    def read():
        loop.claim_workdir(CFG, str(folder))
        return True

    return folder / "config.json", config.to_json(CFG), read


def checkpoint_config(folder):
    path = folder / "checkpoints/4/config/metadata"
    path.parent.mkdir(parents=True)
    stage = Checkpointer(str(folder)).stage
    return path, json.dumps(description(CFG, 4)), lambda: stage(4)


def checkpoint_checksums(folder):
    for name in ("config", "verification"):
        (folder / name).mkdir()
    for name in ("config/metadata", "secret"):
        (folder / name).write_text("{}")
    path = folder / "verification/files.json"
    sums = [2, zlib.crc32(b"{}")]

    def read():
        found = checksums.faults(folder, ["config"])
        # What lies outside of a checkpoint is not opened.
        if b'"config/../secret"' in path.read_bytes():
            assert found == ["verification/files.json is missing or damaged"]
        return True

    return path, json.dumps({"config/metadata": sums, "ema/x": [0, 0]}), read


def data_position(folder):
    mesh = make_mesh(config.MeshConfig(), jax.devices()[:1])
    stream = pipeline.Stream(lambda start: None, mesh, {"records": "x", "examples": 6})

    def read():
        stream.set_state((folder / "position").read_bytes())
        batches = json.loads(stream.get_state())["batches"]
        assert type(batches) is int and batches >= 0
        return True

    return folder / "position", stream.get_state().decode(), read


def bundle_record(folder):
    recorded = {"loss": 0.5, "gradient_norm": "nan"}
    record = {"schema_version": 1, "step": 4, "recorded": recorded, "row_shards": 2}

    def read():
        found = replay._read_record(folder / "bundle.json")
        assert found["step"] is not ... and type(found["row_shards"]) is int
        assert all(type(value) is float for value in found["recorded"].values())
        return found

    text = json.dumps(record | {"found": {"examples": [{"id": 1}]}})
    return folder / "bundle.json", text, read


_MAKERS = (npz_manifest, folder_manifest, export_index, export_config, workdir_config)
_MAKERS += (checkpoint_config, checkpoint_checksums, data_position, bundle_record)
# By name: a file with JSON, what it should hold, and what reads it.
JSON_FILES = {make.__name__: make(hostile.folder(make.__name__)) for make in _MAKERS}


def edited(name, **changes):
    """Records with other arrays, of which a stranger has taken the hash."""
    arrays, text = hostile.records()
    arrays = arrays | {name: changes.get("array", arrays[name])}
    values = json.loads(text)
    hashed = {n: array for n, array in arrays.items() if n != "caption"}
    values["shards"][0]["sha256"] = changes.get("sha256", memory.sha256(hashed))
    members = [(n, hostile.npy(array)) for n, array in arrays.items()]
    members.append(("manifest", hostile.npy(np.array(json.dumps(values)))))
    return members


def set_entry(name, place, value):
    array = hostile.records()[0][name].copy()
    array[place] = value
    return edited(name, array=array)


def with_end(end):
    """Pictures whose file has other bytes at its end."""
    (name, data), *others = edited("image")
    return [(name, data[:-end] if isinstance(end, int) else data + end), *others]


_OWN = hostile.records()[0]
REFUSED = {
    "large offset": (set_entry("offset", 3, 10**9), "offsets do not rise"),
    "negative offset": (set_entry("offset", 3, -1), "offsets do not rise"),
    "offset at the end": (set_entry("offset", 6, 10**9), "offsets do not rise"),
    "negative id": (set_entry("id", 3, -1), "an id is no number"),
    "large id": (set_entry("id", 3, 2**31), "an id is no number"),
    "id of text": (edited("id", array=_OWN["id"].astype(str)), "id is <U21 "),
    "no numbers": (edited("image", array=_OWN["image"] * np.float32("nan")), "is <f4"),
    "one channel": (
        edited("image", array=_OWN["image"][..., :1]),
        "is .u1 .6, 8, 8, 1",
    ),
    "flat": (edited("image", array=_OWN["image"].ravel()), "is .u1 .1152,"),
    "hash": (edited("id", sha256="0" * 64), "do not have the hash"),
    "more": (with_end(b"\0"), "image has 1,281 bytes"),
    "less": (with_end(1), "image has 1,279 bytes"),
    "missing": (edited("id")[1:], "no item named 'image.npy'"),
    "twice": ([*edited("id"), ("id", b"")], "two files of one name"),
}


def zeros(dtype, shape, megabytes):
    """The file of an array of zeros, which deflates to a thousandth."""
    header = io.BytesIO()
    fields = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue() + bytes(megabytes * 2**20)


def with_large(name, member, arrays=(), **changes):
    """Records with another member, and other arrays; the manifest says so."""
    own, text = hostile.records()
    values = json.loads(text)
    values["shards"][0] |= changes
    values["examples"] = values["shards"][0]["examples"]
    own = own | {"manifest": np.array(json.dumps(values))} | dict(arrays)
    members = {n: hostile.npy(array) for n, array in own.items()} | {name: member}
    return hostile.zipped(list(members.items()))


def many_files():
    """A million times the same entry of a directory."""
    data = hostile.zipped([("x", b"")])
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end] * 10**6
    sizes = len(entries).to_bytes(4, "little") + start.to_bytes(4, "little")
    return data[:start] + entries + data[end : end + 12] + sizes + b"\0\0"


def forged_size():
    """64 MiB of which the directory says that they are as few as they should be."""
    data = with_large("image", zeros("|u1", (6, 8, 8, 3), 64))
    place = data.rindex(b"image.npy") - 46 + 24
    return data[:place] + (1280).to_bytes(4, "little") + data[place + 4 :]


LARGE = {
    "manifest": lambda: with_large("manifest", zeros("<U17039360", (), 65)),
    "pictures": lambda: with_large(
        "image",
        zeros("|u1", (107, 1024, 1024, 3), 321),
        {
            "offset": np.arange(108) * 13 // 107,
            "id": np.arange(107),
        },
        **{"examples": 107, "sides": {"1024": 107}},
    ),
    "forged size": forged_size,
    "many files": many_files,
    "spaces": lambda: b" " * 2**27,
    "lists": lambda: b'{"a": [' + b"[]," * 2**24 + b"[]]}",
    # The most values, each of the most memory, and text of four bytes a character.
    "keys": lambda: (
        b"{%s," % b",".join(b'"%032d":1.5' % n for n in range(1_000_000))
        + '"\U0001f600": 1}'.encode()
    ),
    "name": lambda: b'{"' + b"nmae" * 2**23 + b'": 1}',
}
