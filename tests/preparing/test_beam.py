"""The picture half on Beam's runner of one machine."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.errors import UserError

OPTIONS = {"encoder": "none", "stored_size": 16, "shard_examples": 4}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(14):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
        (folder / f"{i}.txt").write_text(f"noise {i}")
    (folder / "3.png").write_bytes(b"broken")
    return folder


def _files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_equals_the_plain_way(pictures, tmp_path):
    pytest.importorskip("apache_beam")
    source = f"folder:{pictures}"
    for name, options in (("plain", {}), ("beam", {"runner": "DirectRunner"})):
        output = str(tmp_path / name)
        prepare.prepare(source, output, progress=False, **OPTIONS, **options)
    beam = _files(tmp_path / "beam")
    assert beam == _files(tmp_path / "plain")
    assert [name for name in beam if name.endswith(".tar")] == [
        f"{k:05d}.tar" for k in range(4)
    ]
    summary = json.loads(beam["pictures.json"])
    assert (summary["examples"], summary["skipped"]) == (13, 1)


def test_finished_shards_are_kept(pictures, tmp_path):
    pytest.importorskip("apache_beam")
    source, output = f"folder:{pictures}", tmp_path / "out"
    divided = {"process_index": 1, "process_count": 2}
    prepare.prepare(source, str(output), progress=False, **OPTIONS, **divided)
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert len(times) == 2
    options = OPTIONS | {"runner": "DirectRunner"}
    assert prepare.prepare(source, str(output), progress=False, **options)
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())


def test_unknown_runners(tmp_path):
    pytest.importorskip("apache_beam")
    with pytest.raises(UserError, match="--runner is 'DirktRunner': "):
        prepare.prepare(
            "shapes:3", str(tmp_path / "out"), runner="DirktRunner", **OPTIONS
        )


def test_without_beam(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'imagen-jax\[prepare\]'"):
        prepare.prepare(
            "shapes:3", str(tmp_path / "out"), runner="DirectRunner", **OPTIONS
        )
