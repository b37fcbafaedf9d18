"""Jobs on sources that deserve no trust: damaged, changing, with names of any kind."""

import contextlib
import json
import os
import resource
import shutil

import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.data.manifest import read_manifest
from imagen_jax.errors import UserError
from imagen_jax.preparing import job, settings
from tests import tars
from tests.npz import captions
from tests.test_doors import call, door

COUNT = 12


def _picture(path, seed):
    """Noise of one size, so that its file has one length."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path, "BMP")


@pytest.fixture
def pictures(tmp_path):
    """Pictures with captions beside them, a minute old."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(COUNT):
        _picture(folder / f"{i:02}.bmp", i)
        (folder / f"{i:02}.txt").write_text(f"noise {i:02}")
    for path in folder.iterdir():
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    return folder


def _prepare(source, output, **options):
    options = {"image_size": 16, "shard_examples": 4, "text_length": 8} | options
    return prepare.prepare(source, str(output), progress=False, **options)


def _bytes(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_a_job_older_than_a_setting(pictures, tmp_path, name, monkeypatch):
    """What it does not record was left at its default."""
    source, output = f"folder:{pictures}", tmp_path / name
    with monkeypatch.context() as patch:
        older = [n for n in settings._RECORDED if n != "max_pixels"]
        patch.setattr(settings, "_RECORDED", older)
        manifest = _prepare(source, output)
    assert "max_pixels" not in manifest.settings
    before = _bytes(output)
    assert _prepare(source, output) == manifest
    with pytest.raises(UserError, match="with max_pixels 128000000, not 900"):
        _prepare(source, output, max_pixels=900)
    assert _bytes(output) == before
    if name == "out":
        # One that was killed goes on.
        (output / "manifest.json").unlink()
        assert _prepare(source, output).examples == COUNT


def test_a_damaged_picture_in_a_npz(pictures, tmp_path):
    """Training's decoder, which cuts its square, reads nothing of it; Pillow all."""
    whole = np.asarray(Image.open(pictures / "03.bmp"))
    Image.fromarray(whole).save(pictures / "03.png")
    (pictures / "03.bmp").unlink()
    rest = (pictures / "03.png").read_bytes()[:-12]
    (pictures / "03.png").write_bytes(rest)
    _prepare(f"folder:{pictures}", tmp_path / "out.npz", image_size=20)
    with np.load(tmp_path / "out.npz") as file:
        place = captions(tmp_path / "out.npz").index("noise 03")
        np.testing.assert_array_equal(file["image"][place], whole[:, 5:25])


# What happens to a folder of pictures and captions while it is read.


def _swap(folder, ending):
    first, other = (folder / f"{i:02}.{ending}" for i in (0, COUNT - 1))
    first.rename(folder / "aside")
    other.rename(first)
    (folder / "aside").rename(other)


def _swap_pictures(folder):
    _swap(folder, "bmp")
    os.utime(folder / "00.bmp")


def _swap_captions(folder):
    _swap(folder, "txt")


def _swap_both(folder):
    for ending in ("bmp", "txt"):
        _swap(folder, ending)
    os.utime(folder / "00.bmp")


def _draw_again(folder):
    _picture(folder / "05.bmp", 99)


def _add(folder):
    _picture(folder / "new.bmp", 99)
    (folder / "new.txt").write_text("new")


def _rename(folder):
    for ending in ("bmp", "txt"):
        (folder / f"05.{ending}").rename(folder / f"5.{ending}")


def _remove_one(folder):
    (folder / "05.bmp").unlink()


def _remove_all(folder):
    shutil.rmtree(folder)


CHANGES = [_swap_pictures, _swap_captions, _swap_both, _draw_again, _add, _rename]
CHANGES += [_remove_one, _remove_all]


def _while_prepared(monkeypatch, change):
    """Calls `change` when the first of the pictures have been read."""
    usable, left = job.usable, [change]

    def changing(*args):
        for row in usable(*args):
            if left:
                left.pop()()
            yield row

    monkeypatch.setattr(job, "usable", changing)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["records", "npz", "pictures"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changes_is_refused(
    pictures, tmp_path, change, kind, monkeypatch
):
    """And nothing of what was written is taken for finished afterwards."""
    source, output = f"folder:{pictures}", tmp_path / f"out.{kind}"
    options = {"encoder": "none"} if kind == "pictures" else {}
    with monkeypatch.context() as patch:
        _while_prepared(patch, lambda: change(pictures))
        with pytest.raises(UserError, match="changed while it was read.*start again"):
            _prepare(source, output, **options)
    with pytest.raises(UserError):
        read_manifest(output)
    assert not output.is_file() and not (output / "pictures.json").exists()
    if change is _remove_all:
        return
    # The records are those of a new job, as soon as there are any.
    fresh = tmp_path / f"fresh.{kind}"
    made = _prepare(source, fresh, **options)
    try:
        again = _prepare(source, output, **options)
    except UserError as error:
        assert "other pictures or captions" in str(error) and output.is_dir()
    else:
        assert again.content_sha256 == made.content_sha256


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_files_that_change_are_refused(pictures, tmp_path, kind, monkeypatch):
    images = {i: (pictures / f"{i:02}.bmp").read_bytes() for i in range(COUNT)}

    def write(place, first):
        path = tmp_path / f"{place}.{'tar' if kind == 'webdataset' else 'parquet'}"
        numbers = range(first, first + 6)
        if kind == "webdataset":
            members = [
                (f"{i:02}.{ending}", data)
                for i in numbers
                for ending, data in (("bmp", images[i]), ("txt", b"noise"))
            ]
            tars.write(path, members)
        else:
            pa = pytest.importorskip("pyarrow")
            pq = pytest.importorskip("pyarrow.parquet")
            data = {"image": [images[i] for i in numbers], "text": ["noise"] * 6}
            pq.write_table(pa.table(data), path, compression="none")
        return path

    paths = [write(0, 0), write(1, 6)]
    lengths = [path.stat().st_size for path in paths]
    for path in paths:
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    source, output = f"{kind}:{paths[0].with_stem('*')}", tmp_path / "out"

    def change():
        assert [write(0, 6).stat().st_size, lengths[1]] == lengths

    with monkeypatch.context() as patch:
        _while_prepared(patch, change)
        with pytest.raises(UserError, match="changed while it was read"):
            _prepare(source, output)
    with pytest.raises(UserError, match="half-written"):
        read_manifest(output)
    # Names and lengths are the same: the same command makes all of it anew.
    assert _prepare(source, output).examples == COUNT
    fresh = _prepare(source, tmp_path / "fresh")
    assert read_manifest(output).content_sha256 == fresh.content_sha256


def test_shards_of_killed_processes_count_no_more(pictures, tmp_path, monkeypatch):
    """They may be of before the change; a finished job's manifest goes as well."""
    source, output = f"folder:{pictures}", tmp_path / "out"
    first = _prepare(source, output)
    (output / "records-00002.tfrecord").unlink()
    with monkeypatch.context() as patch:
        _while_prepared(patch, lambda: _draw_again(pictures))
        with pytest.raises(UserError, match="changed while it was read"):
            _prepare(source, output)
    assert (output / "prepare.json").exists()
    assert not [*output.glob("records-*.json"), *output.glob("manifest.json")]
    again = _prepare(source, output)
    assert again.content_sha256 != first.content_sha256
    assert again.source_sha256 == first.source_sha256


def test_what_else_lies_in_the_folder_may_change(pictures, tmp_path, monkeypatch):
    """The records may be written into the folder of the pictures."""
    _while_prepared(monkeypatch, lambda: (pictures / "log").write_text("..."))
    manifest = _prepare(f"folder:{pictures}", pictures / "out")
    assert manifest.examples == COUNT and read_manifest(pictures / "out") == manifest


# Names that would control a terminal, or are no text at all.
NAMES = [
    b"\x1b]0;title\x07\x1b[31mred.bmp",
    b"line\nerror: all is well.bmp",
    b"back\b\b\rhome.bmp",
    b"c1\xc2\x9b31m.bmp",
    "right\u202eto left.bmp".encode(),
    b"no text \xff\xfe.bmp",
]


@contextlib.contextmanager
def _no_longer_files(kib):
    """No file can be made longer, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kib, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _unprintable(text):
    return {c for c in text if not (c.isprintable() or c in "\n\r")}


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "run"), [("", door), (".npz", call)])
def test_names_are_escaped_on_the_terminal(pictures, tmp_path, ending, run):
    """In the summary and in errors; files have them as they are."""
    for name in NAMES:
        with open(os.path.join(os.fsencode(pictures), name), "wb") as file:
            file.write(b"no picture")
        with open(os.path.join(os.fsencode(pictures), name[:-3] + b"txt"), "w") as file:
            file.write("x")
    output = tmp_path / f"re\x07cords{ending}"
    ask = [f"--source=folder:{pictures}", f"--output={output}", "--image_size=16"]
    done = run("prepare", *ask)
    assert done.returncode == 0, done.stderr
    assert "6 skipped" in done.stdout and not _unprintable(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    assert sum(line.startswith("  ") for line in lines) == 5 and len(lines) == 8
    if not ending:
        rows = (output / "quarantine.jsonl").read_text().splitlines()
        names = {os.fsencode(json.loads(row)["file"]) for row in rows}
        assert names == set(NAMES)
    again = call("prepare", *ask)
    assert "already prepared" in again.stdout and not _unprintable(again.stdout)
    ask = [f"--source=folder:{pictures}", f"--output={tmp_path / 'x'}"]
    refused = call("prepare", *ask, "--max_bad_share=0", "--encoder=none")
    assert refused.returncode == 1 and not _unprintable(refused.stderr)
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: 6 of 18 examples") and ", first '" in last


def test_names_that_are_no_text_in_a_tar(pictures, tmp_path):
    """Pictures whose names are not UTF-8 are used; they keep their names."""
    name = os.fsdecode(b"no text \xff")
    (pictures / "00.bmp").rename(pictures / f"{name}.bmp")
    (pictures / "00.txt").rename(pictures / f"{name}.txt")
    made = _prepare(f"folder:{pictures}", tmp_path / "out", encoder="none")
    assert made.examples == COUNT
    again = _prepare(f"webdataset:{tmp_path}/out/*.tar", tmp_path / "records")
    assert (again.examples, again.skipped) == (COUNT, 0)


@pytest.mark.parametrize(
    "output, more, limit",
    [
        ("out", [], 4),
        ("out", ["--encoder=none"], 4),
        ("out.npz", [], 4),
        ("out", [], 0),
    ],
)
def test_no_room_is_said_in_one_line(pictures, tmp_path, output, more, limit):
    """A limit on the size of files, in place of a full disk."""
    output = tmp_path / output
    ask = [f"--source=folder:{pictures}", f"--output={output}", "--image_size=16"]
    with _no_longer_files(limit):
        done = call("prepare", *ask, *more)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the disk of ") and done.stderr.count("error:") == 1
    assert "is full: make room and start again" in last
    with pytest.raises(UserError):
        read_manifest(output)
    assert not list(tmp_path.rglob("*.tmp"))


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file/out", "file/out.npz", "x" * 300):
        with pytest.raises(UserError, match="--output=.* cannot be made: "):
            _prepare("shapes:2", tmp_path / name)


def test_the_files_of_tfds_need_room_too(tmp_path, monkeypatch):
    from imagen_jax.preparing import tfds

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds, "write_info", no_room)
    with pytest.raises(UserError, match="is full: make room and start again"):
        _prepare("shapes:2", tmp_path / "out")
    monkeypatch.undo()
    assert _prepare("shapes:2", tmp_path / "out").examples == 2
