"""Stores that are not there: one message, soon, through every command.

No network: the request that asks for a bucket is answered here, or by a closed port.
"""

import socket
import time
import urllib.error

import pytest
from etils.epath import backend

from imagen_jax import stores
from imagen_jax.data.pipeline import read_sources
from imagen_jax.errors import UserError
from tests.test_bucket import bucket  # noqa: F401
from tests.test_doors import call, error

TRAIN = ("train", "--config=configs/tiny.py:base")
RECORDS, RUN = "--config.data.records={}", "--workdir={}"
PROMPT = ("--prompt=a red circle", "--output=out")
# Every command that reads or writes a place, with each of its flags that names one.
BUCKETS = {
    "workdir": (*TRAIN, RUN, "--config.data.records=shapes.npz"),
    "records": (*TRAIN, RECORDS, "--workdir=run"),
    "mixture": (*TRAIN, RECORDS.format("{}:1,{}:2"), "--workdir=run"),
    "init_from": (
        *(*TRAIN, "--config.training.init_from={}", "--config.mesh.data=8"),
        *("--config.data.records=shapes.npz", "--workdir=free"),
    ),
    "replay": ("train", "--replay={}/bundles/3"),
    "sample": ("sample", "--stage={}", *PROMPT),
    "export": ("export", "--stage={}", "--output=out"),
    "goodput": ("goodput", "--workdir={}"),
    "benchmark": ("benchmark", TRAIN[1], "--what=data", RECORDS),
}
DISKS = {
    "source": ("prepare", "--source=folder:{}", "--output=out"),
    "tars": ("prepare", "--source=webdataset:{}/*.tar", "--output=out"),
    "output": ("prepare", "--source=shapes:4", "--output={}"),
    "weights": (
        *("prepare", "--source=shapes:4", "--output=out", "--encoder=t5_1_1_small"),
        "--encoder_weights={}",
    ),
    "export to": ("export", "--stage=run", "--output={}"),
    "demo": ("demo", "--output={}"),
}
COMMANDS = BUCKETS | DISKS


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch, tmp_path):
    stores._reason.cache_clear()
    # As where TensorFlow's client would be asked.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: True)
    yield
    stores._reason.cache_clear()


@pytest.fixture
def closed(monkeypatch):
    """A machine from which Google cannot be reached: nobody listens at the port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(stores, "_GOOGLE", f"http://localhost:{port}")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Records, for commands that read them before anything else."""
    path = tmp_path_factory.mktemp("records") / "shapes.npz"
    asked = ("--source=shapes:16", f"--output={path}", "--text_length=16")
    assert call("prepare", *asked, "--image_size=16").returncode == 0
    return path


def refused(name: str, place: str, npz=None) -> str:
    """What a command says of a place; it is one line, and said soon."""
    words = [word.replace("{}", place) for word in COMMANDS[name]]
    words = [word.replace("shapes.npz", str(npz)) for word in words]
    words = [word.replace("=free", f"={npz}.free") for word in words]
    start = time.monotonic()
    done = call(*words)
    assert time.monotonic() - start < 20
    assert done.returncode == 1, (words, done.stderr[-2000:])
    said = error(done)
    assert said.count("\n") == 1 and len(said) < 700, said
    return said


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("scheme", ["s3", "file", "hdfs", "az"])
def test_another_store_is_named_by_its_scheme(name, scheme, npz):
    said = refused(name, f"{scheme}:///none", npz)
    assert f"{scheme}://" in said
    assert ("give '/none" if scheme == "file" else "give a ") in said


@pytest.mark.parametrize("name", BUCKETS)
def test_a_bucket_that_cannot_be_reached_is_named(name, closed, npz):
    said = refused(name, "gs://no-such/runs", npz)
    assert "the bucket gs://no-such cannot be reached" in said and "network" in said


@pytest.mark.parametrize("name", DISKS)
def test_what_needs_a_disk_refuses_buckets(name):
    assert "not used here (gs://): give a path" in refused(name, "gs://b/x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://", "give a folder, or gs://BUCKET/FOLDER"),
        ("gs:///x", "give a folder, or gs://BUCKET/FOLDER"),
        ("gs:/b/x", "give a folder, or gs://BUCKET/FOLDER"),  # of a pathlib.Path
        ("GS://b", "give a folder, or gs://BUCKET/FOLDER"),
        ("file:/x/y", "give '/x/y'"),
        ("https://storage.googleapis.com/b", "(https://)"),
    ],
)
def test_what_is_almost_a_place(path, message):
    with pytest.raises(UserError) as found:
        stores.check_store(path)
    assert message in str(found.value)
    with pytest.raises(UserError, match="not used here"):
        stores.check_disk(path)


@pytest.mark.parametrize(
    "path", ["", "a", "/a:b", "a,b:1", "tfds:x", "folder:y", "a:1"]
)
def test_a_place_on_a_disk_is_not_asked_for(path, monkeypatch):
    monkeypatch.setattr(stores, "_ask", None)
    stores.check_store(path)
    stores.check_disk(path)


def answering(monkeypatch, answer):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        raise answer

    monkeypatch.setattr(stores.urllib.request, "urlopen", urlopen)
    return asked


@pytest.mark.parametrize("code", [400, 401, 403, 404, 500])
def test_what_google_answers(monkeypatch, code):
    asked = answering(monkeypatch, urllib.error.HTTPError("", code, "", {}, None))
    for _ in range(2):  # it is asked once
        if code in (400, 404):
            with pytest.raises(UserError, match="gs://a b does not exist: create it"):
                stores.check_store("gs://a b/c")
        else:  # who may read it is another question
            stores.check_store("gs://a b/c")
    assert asked == ["https://storage.googleapis.com/storage/v1/b/a%20b?fields=name"]


def test_a_certificate_that_python_does_not_know_is_an_answer(monkeypatch):
    reason = stores.ssl.SSLCertVerificationError("no CA")
    answering(monkeypatch, urllib.error.URLError(reason))
    stores.check_store("gs://b/c")


def test_a_network_that_swallows_everything(monkeypatch):
    monkeypatch.setattr(stores, "_SECONDS", 0.1)
    monkeypatch.setattr(stores, "_ask", lambda name: time.sleep(5))
    with pytest.raises(UserError, match="gs://b cannot be reached"):
        stores.check_store("gs://b/c")


def test_a_client_that_is_missing_or_refuses(monkeypatch):
    """fsspec's, where TensorFlow is not installed."""
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    for fault in (ImportError("install gcsfs"), OSError("no route")):

        def exists(path, fault=fault):
            raise fault

        stores._reason.cache_clear()
        monkeypatch.setattr(backend.fsspec_backend, "exists", exists)
        with pytest.raises(UserError, match=f"cannot be reached .{fault}"):
            stores.check_store("gs://b/c")


def test_a_bucket_that_answers_is_read(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    with pytest.raises(UserError, match="there is no 'gs://b/records'"):
        read_sources("gs://b/records:1,gs://b/other:2")


def test_what_a_client_says_later_is_one_line(monkeypatch):
    class PermissionDeniedError(Exception):
        """TensorFlow's own derive from Exception alone."""

    def refuse(workdir):
        raise PermissionDeniedError("Error 403\n when reading gs://b/events.jsonl")

    monkeypatch.setattr("imagen_jax.goodput.read_goodput", refuse)
    said = error(call("goodput", "--workdir=x"))
    assert "Error 403 when reading gs://b" in said and "rights" in said
    assert stores.told(TypeError("gs://b")) == stores.told(OSError("a disk")) == ""
    # As of a process that is lost.
    lost = "UNAVAILABLE: type.googleapis.com/tensorflow.DerivedStatus"
    assert stores.told(RuntimeError(lost)) == ""
