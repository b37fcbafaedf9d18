"""What a stranger wrote is not executed, and is the same data or one error.

The properties are repeated with more and other examples by `benchmarks.hostile`.
"""

import ast
import json
import os
import pathlib
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imagen_jax
from imagen_jax import config
from imagen_jax.cli import peak_memory_gib
from imagen_jax.data import memory
from imagen_jax.data.manifest import read_manifest
from imagen_jax.errors import UserError
from imagen_jax.files import read_index, read_json
from imagen_jax.training import replay
from tests import hostile, tiny
from tests import hostile_files as files
from tests.hostile import outcome

# zipfile says so where a file holds two of one name.
pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")
# The suite draws the same examples every time.
EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", 0))
settings.register_profile(
    "hostile",
    max_examples=EXAMPLES or 80,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
PROPERTY = settings.get_profile("hostile")
# Reading a small .npz file takes a few milliseconds.
OFTEN = settings(PROPERTY, max_examples=EXAMPLES or 200)

PACKAGE = pathlib.Path(imagen_jax.__file__).parent
# Names of calls that run what they read, or import what it names.
EXECUTING = {
    *("eval", "exec", "compile", "__import__", "import_module", "system", "popen"),
    *("unpickle", "literal_eval", "run_path", "run_module"),
}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
files.REFUSED_WORDS = ("allow_pickle", "trust_remote_code", "shell")


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
    if last == "import_module" and isinstance(call.args[0], ast.Constant):
        return []
    bad = [
        last in EXECUTING and builtin,
        name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False",
        name == "torch.load" and given.get("weights_only") != "True",
        "yaml" in name and "load" in last and last != "safe_load",
        any(given.get(word, "False") != "False" for word in files.REFUSED_WORDS),
    ]
    return [ast.unparse(call)] if any(bad) else []


ALLOWED = {
    # A config is a program of the user's own.
    ("api/run.py", "runpy.run_path(name)"),
    # Of two names that are written there.
    ("__init__.py", "importlib.import_module(f'{__name__}.api.{_FILES[name]}')"),
}


def test_the_package_executes_nothing_that_it_reads():
    faults = [
        f"{path}: {found}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for found in executing(path.read_text())
        if (path.relative_to(PACKAGE).as_posix(), found) not in ALLOWED
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


@pytest.mark.slow
@OFTEN
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
        assert_equal(found, {name: arrays[name] for name in found})


@OFTEN
@given(hostile.crafted(*hostile.records()))
def test_crafted_records(crafted):
    """What is read is what the file holds, and training can index it."""
    data, arrays = crafted
    path = hostile.PLACE / "crafted.npz"
    path.write_bytes(data)
    found = outcome(lambda: hostile.read_records(path))
    if found:
        assert_equal(found, {name: arrays[name] for name in found})
        shard = read_manifest(path).shards[0]
        assert memory.sha256(found) == shard["sha256"]
        image, offset = found["image"], found["offset"]
        assert image.shape == (6, 8, 8, 3) and image.dtype == np.uint8
        assert offset[0] == 0 and offset[-1] == len(found["text"])
        assert (np.diff(offset) >= 0).all() and len(offset) == 7
        np.testing.assert_array_equal(found["id"].astype(np.int32), found["id"])


def bundled():
    batch = tiny.batch(files.CFG)
    arrays = {name: getattr(batch, name) for name in ("image", "mask", "id")}
    return arrays | {"text_bfloat16_as_uint16": batch.text.view(np.uint16)}


@PROPERTY
@given(hostile.crafted(bundled()))
def test_crafted_batches(crafted):
    data, arrays = crafted
    path = hostile.PLACE / "batch.npz"
    path.write_bytes(data)
    batch = outcome(lambda: replay._read_batch(path, files.CFG))
    if batch:
        found = {n: getattr(batch, n) for n in ("image", "mask", "id")}
        found["text_bfloat16_as_uint16"] = batch.text.view(np.uint16)
        assert_equal(found, arrays)
        assert found["mask"].view(np.uint8).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", files.JSON_FILES)
@PROPERTY
@given(data=st.data())
def test_hostile_json(name, data):
    path, text, read = files.JSON_FILES[name]
    path.write_text(text)
    assert outcome(read)
    path.write_bytes(data.draw(hostile.hostile_json(text)))
    outcome(read)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "a number that is none, or too large"),
        ('{"a": [1, -1e999]}', "a number that is none, or too large"),
        ('{"a": 1%s}' % ("0" * 400), "a number that is none, or too large"),
        ('{"a": %s}' % ("[" * 16 + "]" * 16), "nested too deeply"),
        ('{"a": %s}' % ("[" * 10**5 + "]" * 10**5), "maximum recursion depth"),
        ("[1]", "holds no JSON object"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names no files"),
        ('{"weight_map": ["a"]}', "names no files"),
        ('{"weight_map": {"a": "\\ud800"}}', "names no files"),
    ],
)
def test_json_is_refused(tmp_path, text, message):
    (tmp_path / "x").write_text(text)
    with pytest.raises(UserError, match=f"x is not an index: .*{message}"):
        read_index(tmp_path / "x", "an index")


def test_an_export_without_a_step():
    path, text, read = files.JSON_FILES["export_config"]
    for step in (None, "4", 4.0):
        path.write_text(json.dumps(json.loads(text) | {"step": step}))
        with pytest.raises(UserError, match="names no step"):
            read()


def test_checksums_of_what_lies_outside_of_a_checkpoint():
    """It is not opened: it could be a device that never ends."""
    path, text, read = files.JSON_FILES["checkpoint_checksums"]
    listed = json.loads(text)
    path.write_text(
        json.dumps(listed | {"config/../secret": listed["config/metadata"]})
    )
    assert read()


def test_a_network_of_many_levels():
    """The halvings of so many have more digits than Python prints."""
    names = ("channels", "num_res_blocks", "self_attention", "text_attention")
    model = dict(zip(names, ([8] * 15_000, [1] * 15_000, *[[False] * 15_000] * 2)))
    with pytest.raises(UserError, match="channels is .*"):
        config.from_json({"model": model}, "x")


@pytest.mark.parametrize("case", files.REFUSED)
def test_records_are_refused(tmp_path, case):
    members, message = files.REFUSED[case]
    (tmp_path / "x.npz").write_bytes(hostile.zipped(members))
    with pytest.raises(UserError, match=f"x.npz'.*{message}"):
        hostile.read_records(tmp_path / "x.npz")


def test_compressed_as_numpy_does_not(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(hostile.zipped(files.edited("id"), zipfile.ZIP_BZIP2))
    with pytest.raises(UserError, match="manifest is not as numpy writes arrays"):
        hostile.read_records(path)


def test_a_truth_value_is_0_or_1(tmp_path):
    arrays = bundled()
    arrays["mask"] = (arrays["mask"].view(np.uint8) * 2).view(bool)
    members = [(name, hostile.npy(array)) for name, array in arrays.items()]
    (tmp_path / "x.npz").write_bytes(hostile.zipped(members))
    with pytest.raises(UserError, match="mask is not of truth values"):
        replay._read_batch(tmp_path / "x.npz", files.CFG)


def test_an_array_that_ends_early_is_not_filled_with_what_lay_in_memory(tmp_path):
    """Its directory has the checksum of what is there, and the size of what is not."""
    data = hostile.zipped(files.with_end(100))
    place = data.rindex(b"image.npy") - 46 + 24
    data = data[:place] + (1280).to_bytes(4, "little") + data[place + 4 :]
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(UserError, match="EOF: reading array data"):
        hostile.read_records(tmp_path / "x.npz")


@pytest.mark.slow
@pytest.mark.parametrize("case", files.LARGE)
def test_what_would_fill_the_memory(case):
    path = hostile.PLACE / "large"
    data = files.LARGE[case]()
    path.write_bytes(data)
    is_zip = data[:2] == b"PK"
    del data
    held = hostile.reset_peak()
    if is_zip:
        assert outcome(lambda: hostile.read_records(path)) is None
    else:
        assert outcome(lambda: config.from_json(read_json(path, "it"), "it")) is None
    assert peak_memory_gib() - held < (0.25 if is_zip else 1)


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
