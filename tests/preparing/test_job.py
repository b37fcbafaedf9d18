"""Killed, divided and resumed jobs write the same bytes."""

import contextlib
import errno
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.data.manifest import read_manifest
from imagen_jax.errors import UserError
from imagen_jax.preparing import job
from tests import tars

SHARDS, EACH = 7, 60
OPTIONS = {"text_length": 8, "stored_size": 24, "embedding_dtype": "int8"}


def _picture(rng, i):
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (40 + i % 9, 50, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG" if i % 2 else "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tars of pictures, some of which are broken, and one of which is cut."""
    folder = tmp_path_factory.mktemp("tars")
    rng = np.random.default_rng(0)
    for k in range(SHARDS):
        members = []
        for i in range(EACH):
            image = b"broken" if i % 13 == k else _picture(rng, i)
            caption = f"the noise {i % 20} of {k % 2}"
            members.append((f"{i:04d}.{'jpg' if i % 2 else 'png'}", image))
            members.append((f"{i:04d}.txt", caption.encode()))
        tars.write(folder / f"{k}.tar", members)
    cut = folder / f"{SHARDS - 1}.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    return f"webdataset:{folder}/*.tar"


def _prepare(source, output, **options):
    options = OPTIONS | options
    return prepare.prepare(source, str(output), progress=False, **options)


def _files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What one process writes that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    _prepare(source, output)
    return _files(output)


STARTER = """
import json, os, sys, time
from imagen_jax import prepare
from imagen_jax.text import embeddings as captions
from imagen_jax.data import start_tensorflow
start_tensorflow()
# Slow enough to be killed somewhere.
embed = captions.Embedder.embed
def slowly(self, captions):
    time.sleep(0.05)
    return embed(self, captions)
captions.Embedder.embed = slowly
for line in sys.stdin:
    if line.startswith("{"):
        child = os.fork()
        if not child:
            prepare.prepare(**json.loads(line), progress=False)
            os._exit(0)
        print(child, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(int(line), 0)[1]), flush=True)
"""


class _Starter:
    """Processes of `prepare` that need not import everything anew."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            # Each of its processes compiles the encoder.
            env=os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, source, output, index=0, count=1):
        """Its number."""
        divided = {"process_index": index, "process_count": count}
        arguments = {"source": source, "output": str(output)}
        return self._ask(json.dumps(arguments | divided | OPTIONS))

    def wait(self, number):
        """Its exit status."""
        return self._ask(number)


@pytest.fixture(scope="module")
def starter():
    starter = _Starter()
    yield starter
    starter.process.stdin.close()
    starter.process.wait()


@pytest.mark.slow
def test_killed_five_times_and_resumed(source, whole, tmp_path, starter):
    output = tmp_path / "out"
    random.seed(0)
    times, kept = [], []
    for _ in range(5):
        number = starter.start(source, output)
        # Until it has come a little further than the last one: later it would be done.
        for _ in range(30_000):
            if len(list(output.glob("*.json"))) > len(times):
                break
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.08))
        os.kill(number, signal.SIGKILL)
        assert starter.wait(number) == -signal.SIGKILL
        times.append({p.name: p.stat().st_mtime_ns for p in output.glob("records*")})
        kept.append(sum(name.endswith(".json") for name in times[-1]))
        assert not (output / "manifest.json").exists()
        with pytest.raises(UserError, match="half-written"):
            read_manifest(output)
    assert 0 < kept[-1] < SHARDS and kept == sorted(kept)
    _prepare(source, output)
    assert _files(output) == whole
    for name, when in times[-1].items():
        if name.endswith(".json"):
            assert (output / name).stat().st_mtime_ns == when, f"{name} again"


@pytest.mark.slow
def test_four_processes_at_once(source, whole, tmp_path, starter):
    output = tmp_path / "out"
    numbers = [starter.start(source, output, index, 4) for index in range(4)]
    assert [starter.wait(number) for number in numbers] == [0] * 4
    assert _files(output) == whole


def test_processes_one_after_the_other(source, whole, tmp_path):
    """In any order; the last one writes the manifest."""
    output = tmp_path / "out"
    for index in (2, 0, 1):
        assert not (output / "manifest.json").exists()
        done = _prepare(source, output, process_index=index, process_count=3)
        assert (done is None) == (index != 1)
    assert _files(output) == whole
    # Another number of processes continues what these have begun.
    other = tmp_path / "other"
    _prepare(source, other, process_index=1, process_count=2)
    assert _prepare(source, other).examples == done.examples
    assert _files(other) == whole


def test_the_quarantine_names_everything(whole):
    lines = [json.loads(line) for line in whole["quarantine.jsonl"].splitlines()]
    manifest = json.loads(whole["manifest.json"])
    assert len(lines) == manifest["skipped"]
    by_tar = {}
    for line in lines:
        by_tar.setdefault(line["file"][0], []).append(line)
    for k in range(SHARDS - 1):
        want = [f"{k}.tar/{i:04d}" for i in range(EACH) if i % 13 == k]
        assert [line["file"] for line in by_tar[str(k)]] == want
        assert all("no picture of a known" in line["reason"] for line in by_tar[str(k)])
    assert by_tar[str(SHARDS - 1)][-1]["file"] == f"{SHARDS - 1}.tar"
    assert manifest["examples"] == sum(s["examples"] for s in manifest["shards"])


def test_a_full_disk(source, whole, tmp_path, monkeypatch):
    """/dev/full takes a file and says that there is no room, as a full disk does."""
    output = tmp_path / "out"
    appearing = job.appearing

    @contextlib.contextmanager
    def full_at_the_third(path):
        with appearing(path) as partial:
            if path.name == "records-00002.tfrecord":
                partial.unlink()
                partial.symlink_to("/dev/full")
            yield partial

    monkeypatch.setattr(job, "appearing", full_at_the_third)
    with pytest.raises(UserError, match="disk of .*out' is full: make room and start"):
        _prepare(source, output)
    monkeypatch.undo()
    names = sorted(path.name for path in output.iterdir())
    shards = [
        f"records-0000{k}.{kind}" for k in (0, 1) for kind in ("json", "tfrecord")
    ]
    assert names == ["prepare.json", *shards]
    _prepare(source, output)
    assert _files(output) == whole


def test_a_full_disk_for_small_files(tmp_path, monkeypatch):
    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(UserError, match="is full"):
        _prepare("shapes:3", tmp_path / "out")
    with pytest.raises(UserError, match="is full"):
        _prepare("shapes:3", tmp_path / "out.npz", stored_size=0)
    assert not list(tmp_path.glob("out/*")) and not (tmp_path / "out.npz").exists()


def test_another_job_is_refused(source, tmp_path):
    output = tmp_path / "out"
    _prepare(source, output, process_index=0, process_count=2)
    with pytest.raises(UserError, match="prepared with embedding_dtype 'int8', not"):
        _prepare(source, output, embedding_dtype="bfloat16")
    with pytest.raises(UserError, match="prepared with stored_size 24, not 0"):
        _prepare(source, output, stored_size=0)


def test_a_shard_whose_file_is_gone_is_written_again(source, whole, tmp_path):
    output = tmp_path / "out"
    _prepare(source, output, process_index=0, process_count=2)
    (output / "records-00002.tfrecord").unlink()
    _prepare(source, output)
    assert _files(output) == whole
    # Also of a job that was finished.
    (output / "records-00003.tfrecord").unlink()
    _prepare(source, output)
    assert _files(output) == whole


def test_pictures_without_embeddings(source, whole, tmp_path):
    """Their tars, embedded later, are the records of the direct way but for names."""
    pictures, records = tmp_path / "pictures", tmp_path / "records"
    first = _prepare(source, pictures, encoder="none")
    assert (first.encoder, first.text_bytes) == ("none", 0)
    with pytest.raises(UserError, match="has pictures without embeddings"):
        read_manifest(pictures)
    second = _prepare(f"webdataset:{pictures}/*.tar", records)
    direct = json.loads(whole["manifest.json"])
    assert (second.examples, second.skipped) == (direct["examples"], 0)
    assert second.image_bytes == direct["image_bytes"]
    assert second.text_bytes == direct["text_bytes"]
    assert second.cosine_error == direct["cosine_error"]
    assert _rows(records) == _rows_of(whole, tmp_path)


def _rows_of(files, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return _rows(folder)


def _rows(folder):
    """All records without their numbers."""
    import tensorflow as tf

    rows = []
    for path in sorted(pathlib.Path(folder).glob("*.tfrecord")):
        for data in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(data).features.feature
            rows.append(
                [feature[n].bytes_list.value[0] for n in ("image", "caption", "text")]
            )
    return rows


def test_too_many_bad_examples_stop_it_early(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_LEAST_EXAMPLES", 10)
    for k in range(4):
        members = [(f"{i}.{e}", b"x") for i in range(6) for e in ("jpg", "txt")]
        tars.write(tmp_path / f"{k}.tar", members)
    with pytest.raises(UserError, match="6 of 6 examples .*first '0.tar/0': it is no"):
        _prepare(f"webdataset:{tmp_path}/*.tar", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.tfrecord"))) == 1


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a"
    with job.appearing(path) as partial:
        partial.write_text("half")
        assert not path.exists() and partial.suffix == ".tmp"
        partial.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_nothing(tmp_path):
    job.write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt):
        with job.appearing(tmp_path / "a") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_two_processes_write_the_same_file(tmp_path):
    """One takes the other's for left over, once its own has appeared."""
    path = tmp_path / "a"
    with job.appearing(path) as slow:
        slow.write_text("same")
        job.write_text(path, "same")
        slow.unlink()
    assert path.read_text() == "same"
    with pytest.raises(FileNotFoundError):
        with job.appearing(tmp_path / "b") as lost:
            lost.write_text("x")
            lost.unlink()


@pytest.mark.slow
def test_a_full_disk_is_said(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(UserError, match="is full: make room and start again"):
            with job.appearing(tmp_path / "a"):
                raise OSError(number, "no room")
    with pytest.raises(PermissionError):
        with job.appearing(tmp_path / "a"):
            raise PermissionError(errno.EACCES, "no")
