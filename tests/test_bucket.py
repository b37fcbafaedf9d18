"""A workdir and records in a bucket: etils' own code on a bucket in memory.

Nothing here reaches Google Cloud, which Orbax would need to save a checkpoint there.
"""

import json

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from imagen_jax import images
from imagen_jax.data.manifest import read_manifest
from imagen_jax.errors import UserError
from imagen_jax.goodput import read_goodput
from imagen_jax.training import checksums, loop
from imagen_jax.training.metrics import MetricWriter, Stopwatch
from tests import tiny


class Bucket(MemoryFileSystem):
    """gs:// as a store of whole objects: none can be appended to."""

    protocol = ("gcs", "gs")
    cachable = False
    store = {}
    pseudo_dirs = [""]

    def __init__(self, *args, finalize_on_close=True, **kwargs):
        super().__init__(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode, "objects cannot be appended to"
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    """The root of an empty bucket, as etils sees it without TensorFlow."""
    # As where TensorFlow is not installed: its own client would go to Google.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend = epath.Path("gs://b")._backend
    assert "FileSystemSpec" in type(backend).__name__
    backend._get_filesystem.cache_clear()
    return epath.Path("gs://b")


def test_a_workdir_in_a_bucket_is_claimed_once(bucket):
    workdir = "gs://b/runs/base"
    cfg = tiny.stage()
    loop.claim_workdir(cfg, workdir)
    loop.claim_workdir(tiny.with_steps(cfg, 9), workdir)
    names = {p.name for p in (bucket / "runs/base").iterdir()}
    assert names == {"config.json", "lock"}
    (bucket / "runs/base/checkpoints/2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        loop.claim_workdir(tiny.stage(optimizer={"learning_rate": 0.5}), workdir)
    (bucket / "thesis").mkdir()
    (bucket / "thesis/a.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no config.json"):
        loop.claim_workdir(cfg, "gs://b/thesis")


def test_logs_in_a_bucket_go_on_where_they_were(bucket):
    for first in (1, 3):
        writer = MetricWriter("gs://b/run", Stopwatch(), tiny.stage())
        writer.begin(first - 1)
        writer.event("start", first)
        writer.scalars(first, {"loss": 0.5})
        writer.scalars(first + 1, {"loss": 0.25})
        writer.close()
        assert not writer.folder.exists()
    rows = (bucket / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    events = (bucket / "run/events.jsonl").read_text().splitlines()
    assert [json.loads(event)["step"] for event in events] == [1, 3]
    assert list((bucket / "run/tensorboard").iterdir())


def test_an_event_takes_what_was_logged_before_it_to_the_bucket(bucket):
    writer = MetricWriter("gs://b/run", Stopwatch(), tiny.stage())
    writer.begin(0)
    writer.scalars(1, {"loss": 0.5})
    assert not (bucket / "run/metrics.jsonl").exists()
    writer.event("checkpoint", 1)
    assert json.loads((bucket / "run/metrics.jsonl").read_text())["loss"] == 0.5
    writer.close()


def test_lines_of_steps_are_not_each_sent_to_the_bucket(bucket):
    writer = MetricWriter("gs://b/run", Stopwatch(), tiny.stage())
    writer.event("start", 0)
    writer.event("steps", 1)
    assert (bucket / "run/events.jsonl").read_text().count("\n") == 1
    writer.event("checkpoint", 1)
    report = read_goodput("gs://b/run")
    assert (report.runs, report.steps, report.last_event) == (1, 1, "checkpoint")
    writer.close()


def test_a_checkpoint_in_a_bucket_is_checked(bucket):
    step = bucket / "run/checkpoints/5"
    for name, content in {
        "ema/d/a": b"abc",
        "ema/b": b"",
        "config/metadata": b"{}",
    }.items():
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(content)
    (step / checksums.ITEM).mkdir()
    checksums._Handler().finalize(step / checksums.ITEM)
    assert checksums.faults(step, ("config", "ema")) == []
    (step / "ema/d/a").write_bytes(b"abd")
    (fault,) = checksums.faults(step, ("config", "ema"))
    assert fault == "ema/d/a has changed since it was written"
    (step / "config/metadata").unlink()
    assert checksums.faults(step, ("config",)) == ["config/metadata is missing"]
    (bucket / "run/damaged").mkdir()
    step.rename(bucket / "run/damaged/5")
    assert (bucket / "run/damaged/5/ema/d/a").read_bytes() == b"abd"
    assert not step.exists()


def test_a_picture_in_a_bucket(bucket):
    images.save("gs://b/a.png", np.zeros((2, 2, 3), np.uint8))
    assert (bucket / "a.png").read_bytes().startswith(b"\x89PNG")


def test_records_in_a_bucket_are_checked(bucket):
    with pytest.raises(UserError, match="there is no 'gs://b/records'"):
        read_manifest("gs://b/records")
    (bucket / "records").mkdir()
    (bucket / "records/other").write_text("")
    with pytest.raises(UserError, match=r"'gs://b/records' has no manifest\.json"):
        read_manifest("gs://b/records")
