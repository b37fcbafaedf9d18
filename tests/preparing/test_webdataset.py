import gzip
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.preparing import webdataset
from imagen_jax.preparing.images import StoredImage
from imagen_jax.preparing.job import open_source
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Example, Problem, Rest
from tests import tars


def _jpeg(i):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _members(count, captions="txt"):
    for i in range(count):
        yield f"{i:09d}.jpg", _jpeg(i)
        if captions in ("txt", "both"):
            yield f"{i:09d}.txt", f"picture {i}".encode()
        if captions in ("json", "both"):
            values = {"caption": f"picture {i}", "url": "http://x", "sha256": "00"}
            yield f"{i:09d}.json", json.dumps(values).encode()


def _read(pattern):
    opened = open_source(Settings(f"webdataset:{pattern}", ""))
    items = [item for k in range(opened.shards) for item in opened.read(k)]
    return [item for item in items if not isinstance(item, Rest)]


@pytest.mark.parametrize("captions", ["txt", "json", "both"])
def test_tars_of_img2dataset(tmp_path, captions):
    for k in range(3):
        tars.write(tmp_path / f"{k:05d}.tar", _members(2 + k, captions))
    items = _read(tmp_path / "*.tar")
    want = [(k, i) for k in range(3) for i in range(2 + k)]
    assert len({item.id for item in items}) == len(items) == 9
    for item, (k, i) in zip(items, want, strict=True):
        assert item.name == f"{k:05d}.tar/{i:09d}" and item.caption == f"picture {i}"
        assert item.read() == _jpeg(i)


def test_names_and_extensions(tmp_path):
    path = tmp_path / "a.tar"
    members = [
        ("dir.d/x.1.PNG", b"1"),
        ("dir.d/x.JPG", b"2"),
        ("dir.d/x.txt", b"\xef\xbb\xbf one \n"),
        ("dir.d/x.cls", b"3"),
        ("y.webp", b"4"),
        ("y.txt", b""),
        ("y.json", b'{"caption": "not asked"}'),
        ("z.txt", b"three"),
        ("w.jpg", b"5"),
        ("v.jpg", b"6"),
        ("v.txt", b"caf\xe9"),
        ("u.jpg", b"7"),
        ("u.json", b"[1"),
    ]
    items = _read(tars.write(path, members))
    assert isinstance(items[0], Example) and items[0].caption == "one"
    assert items[0].read() == b"2"
    assert items[1:] == [
        Problem("a.tar/dir.d/x.1", "has no .txt or .caption or .json file beside it"),
        Problem("a.tar/y", "the caption is empty"),
        Problem("a.tar/z", "has a caption, but there is no such picture"),
        Problem("a.tar/w", "has no .txt or .caption or .json file beside it"),
        Problem("a.tar/v", "the caption is not UTF-8 text"),
        Problem("a.tar/u", "the caption is empty"),
    ]


def _lengths():
    """Where to cut a tar of 4 examples: bytes, examples that are whole before it."""
    with io.BytesIO() as file, tarfile.open(fileobj=file, mode="w") as tar:
        offsets = [0]
        for name, data in _members(4):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            offsets.append(tar.offset)
    for n, (start, stop) in enumerate(itertools.pairwise(offsets)):
        whole = n // 2
        yield start, whole  # between two members
        yield start + 100, whole  # in a header
        yield start + 512 + 3, whole  # in a picture or a caption
        yield stop - 1, whole if n % 2 == 0 else None
    yield offsets[-1], 4


@pytest.mark.parametrize("length, whole", [c for c in _lengths() if c[0] > 100])
def test_what_precedes_a_cut_is_used(tmp_path, length, whole):
    path = tmp_path / "a.tar"
    data = tars.write(path, _members(4)).read_bytes()
    path.write_bytes(data[:length])
    *examples, problem = _read(path)
    if whole is not None:  # else the cut is in the padding behind a caption
        assert len(examples) == whole
    assert all(isinstance(item, Example) for item in examples)
    assert all(e.read() == _jpeg(i) for i, e in enumerate(examples))
    assert problem.name == "a.tar"
    assert problem.reason.endswith(f"after {len(examples)} examples")


def test_other_damage(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"no tar" * 500)
    data = gzip.compress(tars.write(tmp_path / "x", _members(9)).read_bytes(), mtime=0)
    (tmp_path / "c.tar").write_bytes(data)
    (tmp_path / "d.tar").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "x").unlink()
    items = _read(tmp_path / "*.tar")
    problems = [item for item in items if isinstance(item, Problem)]
    assert [p.name for p in problems] == ["a.tar", "b.tar", "d.tar"]
    assert sum(item.name.startswith("c.tar") for item in items) == 9
    with pytest.raises(UserError, match="no tar matches .*quote it for your shell"):
        _read(tmp_path / "*.tgz")


def test_tars_that_cannot_be_read(tmp_path):
    """Not one line for thousands of pictures: the job stops and can continue."""
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(UserError, match="a.tar' cannot be read: Is a directory"):
        _read(tmp_path / "*.tar")


def test_the_sum_is_of_names_and_lengths(tmp_path):
    sums = set()
    for count, name in ((3, "0.tar"), (4, "0.tar"), (4, "1.tar")):
        folder = tmp_path / f"{count}{name}"
        folder.mkdir()
        tars.write(folder / name, _members(count))
        settings = Settings(f"webdataset:{folder}/*.tar", "")
        sums.add(open_source(settings).sha256)
    assert len(sums) == 3


def test_our_tars_are_read_back_and_equal(tmp_path):
    example = Example(7, "n", "z\u00f6lf", lambda: b"")
    rows = [(example, StoredImage(_jpeg(1), 8, False), None)]
    for name in ("a.tar", "b.tar"):
        webdataset.write_tar(tmp_path / name, rows)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    (item,) = _read(tmp_path / "a.tar")
    assert item.name == "a.tar/000000007"
    assert (item.caption, item.read()) == ("z\u00f6lf", _jpeg(1))
