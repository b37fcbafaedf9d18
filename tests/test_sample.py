"""The sampling door: what it takes from flags and files, and what it refuses."""

import json
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax import sample
from imagen_jax.api.samples import check_output
from imagen_jax.errors import UserError
from imagen_jax.prepare import prepare
from imagen_jax.sample import numbers, read_lowres, read_prompts
from tests import tiny
from tests.test_doors import ROOT, call, environment, error, read_described


def test_lists_are_numbers_with_commas():
    assert numbers("guidance", ["1,1.35", "8"], float) == [(1.0, 1.35), (8.0,)]
    assert numbers("estimates", ["0,1"], int) == [(0, 1)]
    with pytest.raises(UserError, match="--guidance=1;2: give numbers with commas"):
        numbers("guidance", ["1;2"], float)


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\nb", ["a", "b"]),
        # What Unicode calls the end of a line, or of a file or a page, is none.
        ("a\u2028b\nc\u0085d\ne\x0bf\x0cg\x1ch\ni\rj\n", 4),
        (b"\n  \n\ta \n\n", ["a"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbf b", ["a", "\ufeff b"]),
        ("красный круг\n", ["красный круг"]),
    ],
)
def test_a_line_ends_at_its_end_and_a_byte_order_mark_is_no_text(tmp_path, data, want):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    found = [prompt.text for prompt in read_prompts([], str(path))]
    assert (len(found) if isinstance(want, int) else found) == want
    assert read_prompts(["first"], str(path))[0] == ("first", "", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\ncafé\n".encode("cp1252"), "line 2 is not UTF-8.*0xe9.*save prompts as"),
        ("a\nb".encode("utf-16"), "line 1 is not UTF-8"),
        (b"a\n\xed\xb3\xa9\n", "line 2 is not UTF-8"),  # a lone surrogate
        (b"\n \n", "prompts.txt holds 0 prompts"),
        (None, "does not exist"),
    ],
)
def test_text_that_is_not_text_is_named(tmp_path, data, message):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_prompts([], str(path))


def test_a_folder_is_no_file_of_prompts(tmp_path):
    with pytest.raises(UserError, match="it is no file"):
        read_prompts([], str(tmp_path))


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud83d", "a \udcff b"])
def test_bytes_from_the_shell_that_are_no_text(prompt):
    """As Python reads an argument that is not UTF-8."""
    with pytest.raises(UserError, match="--prompt='.*udc?.*is not UTF-8"):
        read_prompts(["a", prompt], "")


def _pictures():
    """Files of every mode and shape: name, picture, and how it is saved."""
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (40, 56, 3), np.uint8)
    smooth = np.kron(rgb[:5, :7], np.ones((8, 8, 1), np.uint8))
    alpha = np.dstack([rgb, random.integers(0, 256, (40, 56), np.uint8)])
    deep = random.integers(0, 65_536, (40, 56), np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    square = Image.fromarray(smooth).crop((0, 0, 16, 16))
    return {
        "exact.png": (square, {}),
        "wide.png": (Image.fromarray(smooth), {}),
        "narrow.png": (Image.fromarray(rgb).crop((0, 0, 16, 40)), {}),
        "alpha.png": (Image.fromarray(alpha), {}),
        "grey_alpha.png": (Image.fromarray(alpha).convert("LA"), {}),
        "palette.png": (Image.fromarray(rgb).quantize(16), {"transparency": 3}),
        "palette.gif": (Image.fromarray(rgb).quantize(16), {}),
        "turned.png": (Image.fromarray(smooth), {"exif": turned}),
        "turned.jpg": (Image.fromarray(smooth), {"exif": turned}),
        "deep.png": (Image.fromarray(deep), {}),
        "grey.jpg": (Image.fromarray(smooth).convert("L"), {}),
        "cmyk.jpg": (Image.fromarray(smooth).convert("CMYK"), {}),
        "lossy.webp": (Image.fromarray(smooth), {}),
        "turned_exact.jpg": (square, {"exif": turned}),
    }


@pytest.mark.parametrize("name", _pictures())
def test_pictures_to_start_from_are_what_prepare_stores(tmp_path, name):
    picture, how = _pictures()[name]
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / name
    picture.save(path, **how)
    path.with_suffix(".txt").write_text("a caption")
    prepare(
        f"folder:{tmp_path / 'a'}",
        str(tmp_path / "a.npz"),
        image_size=16,
        encoder="tiny",
        text_length=4,
        progress=False,
    )
    (stored,) = np.load(tmp_path / "a.npz")["image"]
    np.testing.assert_array_equal(read_lowres(str(path), 16), stored)
    if name == "turned.png":  # clockwise: the first column was the last row
        assert stored.shape == (16, 16, 3) and stored.std() > 0
    if name == "exact.png":
        np.testing.assert_array_equal(stored, np.asarray(picture))


def png_header(width, height):
    """A picture's header, and nothing of the picture."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = header, b"IDAT" + zlib.compress(b""), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in chunks
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "no picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "a known format"),
        (b"P6 4 4 255 " + bytes(48), "no picture of a known format"),
        # A size is refused before the picture is decoded, whatever the size.
        (png_header(13_300, 13_300), "13300 by 13300 pixels are more than"),
        (png_header(30_000, 30_000), "30000 by 30000 pixels are more than"),
        (png_header(9, 3), "its shorter side has 3 of 4 pixels"),
        (png_header(4, 4), r"\w+: "),
    ],
)
def test_files_that_are_no_picture_to_start_from(tmp_path, data, message):
    path = tmp_path / "a.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"--lowres={path} cannot be used: .*{message}"):
        read_lowres(str(path), 4)


def test_folders_that_cannot_hold_pictures(tmp_path):
    with pytest.raises(
        UserError, match="'gs://b/x' is in a store that is not used here .gs://"
    ):
        check_output("gs://b/x")
    (tmp_path / "file").touch()
    for name in ("file", "file/x"):
        with pytest.raises(UserError, match=f"{name}: .*/file is no folder to write"):
            check_output(str(tmp_path / name))
    with pytest.raises(UserError, match="--output=: "):
        check_output("")
    check_output(str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()


@pytest.fixture
def door(tmp_path, monkeypatch):
    """Calls the door with a cascade that was never trained."""
    stages = {"base": tiny.untrained()[:1], "both": tiny.untrained()}
    stages["clean"] = tiny.untrained(
        diffusion={"lowres_augmentation": False}, sampler={"aug_level": 0.0}
    )
    monkeypatch.setattr(sample, "open_stages", lambda names, _: stages[names[0]])

    def door(*arguments, stage="both"):
        given = [] if any("--output=" in a for a in arguments) else [f"--output={out}"]
        return call("sample", f"--stage={stage}", *given, *arguments)

    out = tmp_path / "out"
    return door


ONE = "--prompt=a red circle"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([ONE, "--guidance=nan"], "guidance is nan; it must be in [-1000, 1000]"),
        ([ONE, "--guidance=1,inf"], "guidance is inf; it must be in [-1000, 1000]"),
        ([ONE, "--guidance=1e39"], "guidance is 1e+39; it must be in"),
        ([ONE, "--guidance=-1e400"], "guidance is -inf; it must be in"),
        ([ONE, "--guidance="], "--guidance=: give numbers"),
        ([ONE, "--aug_level=nan"], "aug_level is nan; it must be in [0, 1]"),
        ([ONE, "--aug_level=0,1.01"], "aug_level is 1.01; it must be in [0, 1]"),
        ([ONE, f"--seed={2**64}"], "--seed=18446744073709551616: seeds lie in"),
        ([ONE, "--seed=-1"], "--seed=-1: seeds lie in [0, 2**32)"),
        ([ONE, ONE, f"--seed={2**32 - 1}"], "seeds lie in [0, 2**32)"),
        ([ONE, "--num_images=2", f"--seed={2**32 - 1}"], "seeds lie in [0, 2**32)"),
        ([ONE, "--batch_size=0"], "batch_size is 0; it must be in [1, 65536]"),
        ([ONE, f"--steps={2**64}"], "it must be in [1, 65536]"),
        ([ONE, "--estimates=2"], "--estimates: a stage has 2 steps, from 0"),
        ([ONE, "--estimates=-1"], "--estimates: a stage has 2 steps, from 0"),
        ([ONE, "--lowres=a.png"], "--lowres is given, but the first stage is a base"),
        (["--prompt=caf\udce9"], "is not UTF-8"),
        ([], "there is nothing to sample"),
    ],
)
def test_what_cannot_be_sampled_is_refused(door, tmp_path, arguments, message):
    done = door(*arguments)
    assert done.returncode == 1 and message in error(done)
    assert error(done).count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0", "0.0,0.3", "0.5"])
def test_levels_of_a_stage_without_augmentation_are_refused(door, tmp_path, value):
    done = door(ONE, f"--aug_level={value}", stage="clean")
    assert done.returncode == 1
    assert "--aug_level: stage 2 (sr) was trained without augmentation" in error(done)
    assert not (tmp_path / "out").exists()


def test_the_output_is_tried_before_weights_are_loaded(door, tmp_path, monkeypatch):
    """A file, a place below one, one that the system makes no folders in."""
    monkeypatch.setattr(tiny.Untrained, "load", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/x", "link"):
        done = door(ONE, f"--output={tmp_path / name}")
        assert done.returncode == 1 and f"--output={tmp_path / name}" in error(done)
    for name in ("/proc/pictures", f"{tmp_path}/{'x' * 300}", ""):
        done = door(ONE, f"--output={name}")
        assert done.returncode == 1 and f"--output={name}" in error(done)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_prompts_by_images_by_values(door, tmp_path):
    """Sheets and grid, and where they are, told at the end."""
    (tmp_path / "p.txt").write_text("a\u2028b\nкрасный круг\n")
    more = ["--num_images=2", "--guidance=1,2", "--seed=7", "--batch_size=8"]
    done = door(f"--prompts={tmp_path / 'p.txt'}", *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"8 pictures in {tmp_path / 'out'}, shown in grid.png" in done.stdout
    described = read_described(tmp_path / "out")
    assert [line["prompt"] for line in described[::4]] == ["a\u2028b", "красный круг"]
    assert [line["seed"] for line in described] == [7, 7, 8, 8, 9, 9, 10, 10]
    assert len(list((tmp_path / "out").glob("sheet_*.png"))) == 4
    asked = json.loads((tmp_path / "out" / "job.json").read_text())["asked"]
    assert asked["prompts"] == ["a\u2028b", "красный круг"]


@pytest.mark.slow
def test_what_is_known_of_a_prompt_is_in_its_lines(door, tmp_path):
    """Two of three are drawn; one more is given, of which nothing is known."""
    text = "Prompt,Category,file_name\na,One,a.jpg\nb,Two,\nc,,c.jpg\n"
    (tmp_path / "p.csv").write_text(text)
    file = [f"--prompts={tmp_path / 'p.csv'}", "--count=2", "--prompt_seed=3"]
    done = door(ONE, *file, "--num_images=2")
    assert done.returncode == 0, done.stderr[-3000:]
    names = "prompt", "category", "image"
    found = [
        tuple(line.get(name) for name in names)
        for line in read_described(tmp_path / "out")
    ]
    every = [("a", "One", "a.jpg"), ("b", "Two", None), ("c", None, "c.jpg")]
    drawn = [every[i] for i in np.random.default_rng(3).choice(3, 2, replace=False)]
    want = [("a red circle", None, None), *drawn]
    assert found == [one for one in want for _ in "ab"]
    done = door(ONE, "--count=2")
    assert done.returncode == 1 and "--count and --prompt_seed are for" in error(done)


def test_ctrl_c_leaves_what_is_finished(door, tmp_path, monkeypatch):
    """And says how many, and how to go on; then the same command does."""
    make, path = sample.make, tmp_path / "out" / "0001.png"
    assert door(ONE, "--num_images=3").returncode == 0
    whole = path.read_bytes()
    path.unlink()

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "make", stopped)
    done = door(ONE, "--num_images=3")
    assert done.returncode == 3
    assert (
        f"stopped with 2 of 3 pictures in {tmp_path / 'out'}; the same" in done.stderr
    )
    monkeypatch.setattr(sample, "make", make)
    assert door(ONE, "--num_images=3").returncode == 0
    assert path.read_bytes() == whole


# The door with a cascade that was never trained, as a process.
PROCESS = """
from imagen_jax import cli, sample
from tests import tiny

sample.open_stages = lambda *names: tiny.untrained()
sample.define_flags()
cli.run(sample.main)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path):
    """With SIGKILL, once it has written some pictures of each stage."""

    def start(output):
        (tmp_path / "p.txt").write_text("".join(f"circle {i}\n" for i in range(30)))
        command = [sys.executable, "-c", PROCESS, f"--prompts={tmp_path / 'p.txt'}"]
        command += ["--stage=x", f"--output={output}", "--batch_size=4", "--steps=20"]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
        )

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for few in ("0003_8px.png", "0007.png"):
        with start(killed) as process:
            deadline = time.monotonic() + 200
            while not (killed / few).exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.kill()
    times = {path: path.stat().st_mtime_ns for path in killed.glob("[0-9]*.png")}
    assert 30 < len(times) < 60
    for output in (killed, whole):
        with start(output) as process:
            assert process.wait(300) == 0
    assert all(path.stat().st_mtime_ns == made for path, made in times.items())
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == files
    assert len(read_described(killed)) == 30
