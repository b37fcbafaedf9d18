"""Nothing that is read is executed, wherever it comes from.

What a hostile exported folder cannot do is in tests/training/test_exported.py.
"""

import ast
import functools
import json
import os
import shutil
import sys
import zlib

import jax
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.data import manifest as manifests
from imagen_jax.data.pipeline import Stream
from imagen_jax.errors import UserError
from imagen_jax.sharding import make_mesh
from imagen_jax.training import initial_state as start
from imagen_jax.training import loop
from imagen_jax.training import replay as bundle
from imagen_jax.training.checkpoint import Checkpointer
from tests import tiny
from tests.test_house import sources

CFG = tiny.stage(model=tiny.ONE_LEVEL)
DEEP = b"[" * 100_000
# What JSON may hold and a reader not expect.
TEXTS = {
    "deep": DEEP,
    "bytes": b"\xff\xfe\x00{",
    "nothing": b"",
    "list": b"[]",
    "null": b"null",
    "number": b"9" * 10_000,
    "other": b'{"__class__": "os.system", "__reduce__": ["touch evil"]}',
}

# Names of calls that run what they read, or import what it names.
EXECUTING = {
    *("eval", "exec", "compile", "__import__", "import_module", "system", "popen"),
    *("unpickle", "literal_eval", "run_path", "run_module"),
}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(text):
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]


def executing(text: str) -> list[str]:
    """What of a file's source might execute what it reads."""
    found = []
    for call in calls(text):
        name = ast.unparse(call.func)
        last = name.split(".")[-1]
        # Methods of others with these names: jax's `lowered.compile`, `re.compile`.
        builtin = name == last or last not in ("compile", "eval")
        if last in EXECUTING and builtin:
            found.append(name)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            found.append(f"{name} without allow_pickle=False")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{name} without weights_only=True")
        if "yaml" in name and last != "safe_load" and "load" in last:
            found.append(name)
        for word in ("allow_pickle", "trust_remote_code", "shell"):
            if given.get(word, "False") != "False":
                found.append(f"{name}({word})")
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [n for n in names if n.split(".")[0] in PICKLING]
    return found


def test_the_package_executes_nothing_that_it_reads():
    faults = [
        f"{path}: {found}" for path, text in sources() for found in executing(text)
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


def write(path, what):
    """A file, or a pipe, which would be read for ever."""
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(TEXTS[what])


KINDS = [*TEXTS, "pipe"]


@pytest.fixture(autouse=True)
def _nothing_happens(tmp_path, monkeypatch):
    """No module is imported and no file written, but by name those of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('imported', 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert "evil" not in sys.modules and not (tmp_path / "imported").exists()


@pytest.mark.parametrize("what", KINDS)
def test_config_of_a_workdir(tmp_path, what):
    run = tmp_path / "run"
    run.mkdir()
    write(run / "config.json", what)
    with pytest.raises(UserError, match=r"config(\.json)?"):
        loop.check_workdir(CFG, str(run))


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"channels": [10**30]}},
        {"model": {"channels": [8] * 10**5, "num_res_blocks": [1] * 10**5}},
        {"text": {"encoder": ["evil"]}},
        {"name": {"__import__": "evil"}},
        {"training": {"steps": "evil"}},
        {"evil": {}},
    ],
)
def test_values_of_a_config(tmp_path, values):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError):
        loop.check_workdir(CFG, str(run))


@functools.cache
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    (workdir / "config.json").write_text("{}")
    checkpointer = Checkpointer(str(workdir), CFG.training)
    checkpointer.save(start.create_state(CFG, mesh()), CFG, b"at 0")
    checkpointer.close()
    return workdir


def rewrite(workdir, name, content):
    """A file of the checkpoint, with a checksum that is right."""
    folder = workdir / "checkpoints/0"
    (folder / name).write_bytes(content)
    listed = json.loads((folder / "verification/files.json").read_text())
    listed[name] = len(content), zlib.crc32(content)
    (folder / "verification/files.json").write_text(json.dumps(listed))


FILES = ["config/metadata", "iterator/metadata", "train/_METADATA", "ema/_sharding"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", [w for w in TEXTS if w != "nothing"])
def test_files_of_a_checkpoint(saved, tmp_path, name, what):
    """Signed by whoever changed them. What Orbax can do without is not missed."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    rewrite(workdir, name, TEXTS[what])
    try:
        Checkpointer(str(workdir)).stage()
        Checkpointer(str(workdir)).restore(CFG, mesh())
    except UserError as error:
        assert "checkpoint 0" in str(error)
    else:
        assert name == "ema/_sharding"


def test_handlers_that_a_checkpoint_names_are_not_imported(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    path = workdir / "checkpoints/0/_CHECKPOINT_METADATA"
    described = json.loads(path.read_text())
    handlers = dict.fromkeys(described["item_handlers"], "evil.Handler")
    path.write_text(json.dumps(described | {"item_handlers": handlers}))
    state, position = Checkpointer(str(workdir)).restore(CFG, mesh())
    assert position == b"at 0" and int(state.step) == 0


@pytest.mark.parametrize(
    "position",
    [
        *(text for text in TEXTS.values() if text != DEEP),
        *(
            json.dumps({"batches": batches, "hosts": 1, "identity": identity}).encode()
            for batches, identity in [(-1, {}), (10**30, {}), (1.5, {}), (1, [])]
        ),
    ],
)
def test_positions_of_data(position):
    stream = Stream(None, mesh(), {})
    with pytest.raises(UserError, match="position is damaged"):
        stream.set_state(position)


@pytest.mark.parametrize("what", TEXTS)
def test_a_manifest(tmp_path, what):
    write(tmp_path / "manifest.json", what)
    with pytest.raises(UserError, match=r"manifest"):
        manifests.read_manifest(str(tmp_path))


COUNTS = ("text_dim", "examples", "text_bytes", "image_bytes", "tokens_max")
COUNTS += ("cut_captions", "reencoded", "skipped")
MANIFEST = {
    **dict.fromkeys(COUNTS, 1),
    **{"format": manifests.FORMAT, "embedding_dtype": "bfloat16"},
    **{"settings": {}, "cosine_error": {}, "skipped_files": []},
    **{"source_sha256": "", "encoder": "", "tokens_mean": 1.0},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"examples": "1"},
        {"text_dim": "64"},
        {"encoder": ["evil"]},
        {"shards": "evil"},
    ],
)
def test_values_of_a_manifest(changes):
    values = MANIFEST | {"shards": []}
    assert manifests.from_json(json.dumps(values), "x").examples == 1
    with pytest.raises(UserError, match="x is damaged: .* is not what"):
        manifests.from_json(json.dumps(values | changes), "x")


@pytest.mark.parametrize("what", KINDS)
def test_a_bundle(tmp_path, what):
    write(tmp_path / "bundle.json", what)
    with pytest.raises(UserError, match=r"bundle\.json is damaged"):
        bundle.replay(str(tmp_path))
