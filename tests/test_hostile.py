"""What a stranger wrote is not executed, and is the same data or one error.

The properties are repeated with more and other examples by `benchmarks.hostile`.
"""

import ast
import io
import json
import os
import pathlib
import zipfile
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imagen_jax
from imagen_jax import config
from imagen_jax.cli import peak_memory_gib
from imagen_jax.data.manifest import read_manifest
from imagen_jax.data.pipeline import Stream
from imagen_jax.errors import UserError, read_json
from imagen_jax.sharding import make_mesh
from imagen_jax.training import checksums, loop, replay
from imagen_jax.training.checkpoint import Checkpointer, description
from imagen_jax.training.weights import CONFIG, INDEX, open_weights
from tests import hostile, tiny
from tests.hostile import outcome

# The suite draws the same examples every time.
EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", 0))
settings.register_profile(
    "hostile",
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
PROPERTY = settings(settings.get_profile("hostile"))
CFG = tiny.stage(model=tiny.ONE_LEVEL)

PACKAGE = pathlib.Path(imagen_jax.__file__).parent
# Names of calls that run what they read, or import what it names.
EXECUTING = {
    *("eval", "exec", "compile", "__import__", "import_module", "system", "popen"),
    *("unpickle", "literal_eval", "run_path", "run_module"),
}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
REFUSED_WORDS = ("allow_pickle", "trust_remote_code", "shell")


def executing(text: str) -> list[str]:
    """What in a file's source might execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [n for n in names if n.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom):
            found += [m for m in [node.module or ""] if m.split(".")[0] in PICKLING]
        elif isinstance(node, ast.Call):
            found += _executing_call(node)
    return found


def _executing_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    last = name.split(".")[-1]
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    # Methods of others with these names: jax's `lowered.compile`, `re.compile`.
    builtin = name == last or last not in ("compile", "eval")
    bad = [
        last in EXECUTING and builtin,
        name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False",
        name == "torch.load" and given.get("weights_only") != "True",
        "yaml" in name and "load" in last and last != "safe_load",
        any(given.get(word, "False") != "False" for word in REFUSED_WORDS),
    ]
    return [ast.unparse(call)] if any(bad) else []


def test_the_package_executes_nothing_that_it_reads():
    faults = [
        f"{path}: {found}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for found in executing(path.read_text())
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "importlib.import_module(name)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
    ],
)
def test_what_would_execute_is_found(text):
    assert executing(text)


def assert_equal(found, want):
    assert found.keys() == want.keys()
    for name, array in found.items():
        assert array.dtype == want[name].dtype
        np.testing.assert_array_equal(array, want[name])


@PROPERTY
@given(st.data())
def test_damaged_records(data):
    arrays, manifest = hostile.records()
    members = [(n, hostile.npy(a)) for n, a in arrays.items()]
    members.append(("manifest", hostile.npy(np.array(manifest))))
    method = data.draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED]))
    path = hostile.PLACE / "damaged.npz"
    path.write_bytes(data.draw(hostile.damaged(hostile.zipped(members, method))))
    found = outcome(lambda: hostile.read_records(path))
    if found:
        assert_equal(found | {"caption": arrays["caption"]}, arrays)


@PROPERTY
@given(hostile.crafted(*hostile.records()))
def test_crafted_records(crafted):
    """What is read is what the file holds, and training can index it."""
    data, arrays = crafted
    path = hostile.PLACE / "crafted.npz"
    path.write_bytes(data)
    found = outcome(lambda: hostile.read_records(path))
    if found:
        arrays.pop("caption")
        assert_equal(found, arrays)
        image, offset = found["image"], found["offset"]
        assert image.shape == (6, 8, 8, 3) and image.dtype == np.uint8
        assert offset[0] == 0 and offset[-1] == len(found["text"])
        assert (np.diff(offset) >= 0).all() and len(offset) == 7
        np.testing.assert_array_equal(found["id"].astype(np.int32), found["id"])


def bundled():
    batch = tiny.batch(CFG)
    arrays = {name: getattr(batch, name) for name in ("image", "mask", "id")}
    return arrays | {"text_bfloat16_as_uint16": batch.text.view(np.uint16)}


@PROPERTY
@given(hostile.crafted(bundled()))
def test_crafted_batches(crafted):
    data, arrays = crafted
    path = hostile.PLACE / "batch.npz"
    path.write_bytes(data)
    batch = outcome(lambda: replay._read_batch(path, CFG))
    if batch:
        found = {n: getattr(batch, n) for n in ("image", "mask", "id")}
        found["text_bfloat16_as_uint16"] = batch.text.view(np.uint16)
        assert_equal(found, arrays)


def json_files():
    """By name: a file that is read as JSON, its text, and what reads it."""
    stage = json.dumps(description(CFG, 4))
    folder = hostile.folder("records")
    for name in ("dataset_info.json", "features.json", "a.tfrecord"):
        (folder / name).touch()
    manifest = json.loads(hostile.records()[1])
    manifest["shards"][0]["file"] = "a.tfrecord"
    yield (
        *("manifest", folder / "manifest.json", json.dumps(manifest)),
        lambda: read_manifest(folder),
    )
    export = hostile.folder("export")
    (export / CONFIG).write_text(stage)
    weights = {name: f"{name}.safetensors" for name in "ab"}
    for name, file in weights.items():
        safetensors.numpy.save_file({name: np.ones(3, "f4")}, export / file)
    index = json.dumps({"metadata": {"total_size": 24}, "weight_map": weights})
    yield "index", export / INDEX, index, lambda: open_weights(str(export))
    single = hostile.folder("single")
    safetensors.numpy.save_file({"a": np.ones(3, "f4")}, single / "model.safetensors")
    yield "export", single / CONFIG, stage, lambda: open_weights(str(single))
    run = hostile.folder("run")
    yield (
        *("workdir", run / "config.json", config.to_json(CFG)),
        lambda: loop.claim_workdir(CFG, str(run)) or True,
    )
    step = hostile.folder("checkpoint") / "checkpoints/4"
    (step / "config").mkdir(parents=True)
    checkpointer = Checkpointer(str(step.parents[1]))
    yield (
        *("checkpoint", step / "config/metadata", stage),
        lambda: checkpointer.stage(4),
    )
    listed = hostile.folder("listed")
    for name in ("config", "verification"):
        (listed / name).mkdir()
    (listed / "config/metadata").write_text("{}")
    yield (
        *("checksums", listed / "verification/files.json"),
        json.dumps({"config/metadata": [2, zlib.crc32(b"{}")], "ema/x": [0, 0]}),
        lambda: checksums.faults(listed, ["config"]),
    )
    mesh = make_mesh(config.MeshConfig(), jax.devices()[:1])
    stream = Stream(lambda start: iter([]), mesh, {"records": "x", "examples": 6})
    position = hostile.folder("position") / "position"
    yield (
        *("position", position, stream.get_state().decode()),
        lambda: stream.set_state(position.read_bytes()) or True,
    )
    recorded = {"loss": 0.5, "gradient_norm": "nan"}
    record = {"schema_version": 1, "step": 4, "recorded": recorded, "row_shards": 2}
    bundle = hostile.folder("bundle") / "bundle.json"
    yield (
        *("bundle", bundle, json.dumps(record | {"found": {"examples": [{"id": 1}]}})),
        lambda: replay._read_record(bundle),
    )


JSON_FILES = {name: own for name, *own in json_files()}


@pytest.mark.parametrize("name", JSON_FILES)
@PROPERTY
@given(data=st.data())
def test_hostile_json(name, data):
    path, text, read = JSON_FILES[name]
    path.write_text(text)
    assert outcome(read) not in (None, False)
    path.write_bytes(data.draw(hostile.hostile_json(text)))
    outcome(read)


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


def with_forged_size():
    """The directory says that a member is as small as it should be."""
    want = len(hostile.npy(hostile.records()[0]["image"]))
    data = with_large("image", zeros("|u1", (6, 8, 8, 3), 320))
    place = data.rindex(b"image.npy") - 46 + 24
    return data[:place] + want.to_bytes(4, "little") + data[place + 4 :]


LARGE = {
    "manifest": lambda: with_large("manifest", zeros("<U83886080", (), 320)),
    "pictures": lambda: with_large(
        "image",
        zeros("|u1", (107, 1024, 1024, 3), 321),
        {
            "offset": np.arange(108) * 13 // 107,
            "id": np.arange(107),
            "caption": np.array(["x"] * 107),
        },
        **{"examples": 107, "sides": {"1024": 107}},
    ),
    "forged size": with_forged_size,
    "many files": lambda: hostile.zipped([(str(i), b"") for i in range(20_000)]),
    "spaces": lambda: b" " * 2**27,
    "lists": lambda: b'{"a": [' + b"[]," * 2**24 + b"[]]}",
    # The most values, each of the most memory, and text of four bytes a character.
    "keys": lambda: (
        b"{%s," % b",".join(b'"%032d":1.5' % n for n in range(1_400_000))
        + '"\U0001f600": 1}'.encode()
    ),
    "name": lambda: b'{"' + b"nmae" * 2**23 + b'": 1}',
}


@pytest.mark.parametrize("case", LARGE)
def test_what_would_fill_the_memory(case):
    path = hostile.PLACE / "large"
    data = LARGE[case]()
    path.write_bytes(data)
    is_zip = data[:2] == b"PK"
    del data
    if os.path.exists("/proc/self/clear_refs"):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # of the peak
    held = peak_memory_gib()
    if is_zip:
        assert outcome(lambda: hostile.read_records(path)) is None
    else:
        assert outcome(lambda: config.from_json(read_json(path, "it"), "it")) is None
    assert peak_memory_gib() - held < 1


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    for read in (lambda: read_json(path, "it"), lambda: hostile.read_records(path)):
        with pytest.raises(UserError):
            read()
