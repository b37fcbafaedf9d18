"""The doors as a user meets them, from shapes to pictures.

Called with command lines in this process, but for one that is stopped by a signal.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from imagen_jax import cli
from imagen_jax.prepare import prepare

ROOT = Path(__file__).parents[1]
# A cascade that trains in seconds: two steps of the smallest networks.
TINY = [
    "--config.model.channels=(8,)",
    "--config.model.num_res_blocks=(1,)",
    "--config.model.self_attention=(False,)",
    "--config.model.text_attention=(False,)",
    "--config.model.text_conditioning=mean_pool",
    "--config.training.batch_size=8",
    "--config.training.steps=2",
    "--config.training.sample_every_steps=2",
    "--config.training.preview_images=4",
    "--config.sampler.steps=2",
    "--config.sampler.batch_size=8",
]
ENDLESS = ["--config.training.steps=1000000", "--config.training.sample_every_steps=0"]


def once(*given: str) -> list[str]:
    """The last flag of each name: a command takes none twice."""
    return list({flag.partition("=")[0]: flag for flag in given}.values())


def environment() -> dict[str, str]:
    """One device, as a laptop has it; compiled as tests/conftest.py says."""
    flags = os.environ["XLA_FLAGS"].split()
    flags = [f for f in flags if "host_platform_device_count" not in f]
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def door(verb: str, *arguments: str, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"imagen_jax.{verb}", *map(str, arguments)],
        cwd=ROOT,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def error(done: subprocess.CompletedProcess) -> str:
    """The one message of a failed door; a traceback is a fault."""
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    found = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, done.stderr[-3000:]
    return done.stderr[done.stderr.index("error: ") :]


def call(verb: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a door in this process as its command line would."""
    module = importlib.import_module(f"imagen_jax.{verb}")
    argv = [verb, *map(str, arguments)]
    defined = set(flags.FLAGS)
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        # Overrides of a config are read from there.
        patch.setattr(sys, "argv", argv)
        patch.chdir(ROOT)
        try:
            module.define_flags()
            cli.run(module.main, argv)
        finally:
            for name in set(flags.FLAGS) - defined:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
    return subprocess.CompletedProcess(
        argv, left.value.code, out.getvalue(), err.getvalue()
    )


def train(variant: str, workdir: Path, records: Path, *more: str):
    """Trains a stage of configs/tiny.py, made smaller."""
    return call(
        "train",
        f"--config=configs/tiny.py:{variant}",
        f"--workdir={workdir}",
        f"--config.data.records={records}",
        *once(*TINY, *more),
    )


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """Records and two trained stages: `(records, base, sr)`."""
    folder = tmp_path_factory.mktemp("cascade")
    records, base, sr = folder / "records", folder / "base", folder / "sr"
    done = call(
        "prepare",
        "--source=shapes:40",
        "--image_size=32",
        f"--output={records}",
        "--text_length=16",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for variant, workdir in (("base", base), ("sr", sr)):
        done = train(variant, workdir, records)
        assert done.returncode == 0, done.stderr[-3000:]
    return records, base, sr


def read_described(output: Path) -> list[dict]:
    return [json.loads(line) for line in open(output / "samples.jsonl")]


@pytest.mark.slow
def test_a_cascade_from_shapes_to_pictures(cascade, tmp_path):
    """Each line of samples.jsonl tells how to make its picture again, alone."""
    _, base, sr = cascade
    stages = [f"--stage={base}", f"--stage={sr}"]
    prompts = ["a red circle", "two blue squares", "a small green ring"]
    done = call(
        "sample",
        *stages,
        *(f"--prompt={p}" for p in prompts),
        f"--output={tmp_path / 'all'}",
        "--seed=5",
        "--guidance=2",
        "--guidance=1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"3 pictures in {tmp_path / 'all'}" in done.stdout
    described = read_described(tmp_path / "all")
    assert [p["prompt"] for p in described] == prompts
    assert [p["seed"] for p in described] == [5, 6, 7]
    last = described[2]
    guidance = last["guidance"]
    assert guidance == [2.0, 1.0] and last["aug_level"] == [None, 0.1]
    done = call(
        "sample",
        *stages,
        f"--prompt={last['prompt']}",
        f"--seed={last['seed']}",
        f"--output={tmp_path / 'one'}",
        *(f"--guidance={w}" for w in guidance),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for size, name in ((32, "0000.png"), (16, "0000_16px.png")):
        again = np.asarray(Image.open(tmp_path / "one" / name))
        first = np.asarray(Image.open(tmp_path / "all" / name.replace("0000", "0002")))
        assert again.shape == (size, size, 3)
        # One row alone is another program: a rounding may differ.
        assert np.abs(again.astype(int) - first).max() <= 1
    assert (tmp_path / "all" / "grid.png").is_file()


@pytest.mark.slow
def test_an_exported_stage_makes_the_same_pictures(cascade, tmp_path):
    _, base, _ = cascade
    done = call("export", f"--stage={base}", f"--output={tmp_path / 'export'}")
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = []
    for stage in (base, tmp_path / "export"):
        output = tmp_path / f"of_{stage.name}"
        ask = [f"--stage={stage}", "--prompt=a red circle", f"--output={output}"]
        done = call("sample", *ask)
        assert done.returncode == 0, done.stderr[-3000:]
        pictures.append((output / "0000.png").read_bytes())
    assert pictures[0] == pictures[1]
    again = call("export", f"--stage={base}", f"--output={tmp_path / 'export'}")
    assert again.returncode == 1 and "exists and is not empty" in error(again)


@pytest.mark.slow
def test_values_compared_on_labelled_sheets(cascade, tmp_path):
    """Two weights by two levels of one existing picture, enlarged."""
    _, base, sr = cascade
    small = tmp_path / "small.png"
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(small)
    ask = [f"--stage={sr}", "--prompt=a red circle", f"--output={tmp_path / 'out'}"]
    done = call(
        "sample",
        *ask,
        f"--lowres={small}",
        "--guidance=1,3",
        "--aug_level=0.0,0.5",
        "--estimates=0,1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    described = read_described(out)
    assert [(p["guidance"], p["aug_level"]) for p in described] == [
        ([w], [level]) for level in (0.0, 0.5) for w in (1.0, 3.0)
    ]
    assert {p["lowres"] for p in described} == {str(small)}
    made = [np.asarray(Image.open(out / p["file"])) for p in described]
    # Hardly trained, the network makes little of the weight.
    assert len({picture.tobytes() for picture in made}) > 1
    # Two columns and two rows of 96 pixels, with labels.
    width, height = Image.open(out / "sheet_0000.png").size
    assert 192 < width < 240 and 192 < height < 280
    assert Image.open(out / "0003_estimates_32px.png").size[0] == width
    for more, message in [
        (
            [f"--lowres={small}", "--aug_level=1.5"],
            "aug_level is 1.5; it must be in [0, 1]",
        ),
        ([f"--lowres={small}", "--guidance=1;2"], "commas between them"),
        ([f"--lowres={small}", "--estimates=0,2"], "a stage has 2 steps, from 0"),
        ([f"--lowres={tmp_path / 'none.png'}"], "cannot be used"),
        ([f"--lowres={small}", "--seed=9"], "seed is 0 there, 9 here"),
        ([], "or pictures to start from"),
    ]:
        refused = call("sample", *ask, *more)
        assert refused.returncode == 1 and message in error(refused)


@pytest.mark.slow
def test_stages_that_do_not_fit_are_refused(cascade, tmp_path):
    records, base, sr = cascade
    output = tmp_path / "samples"
    ask = ["--prompt=a red circle", f"--output={output}"]
    wrong_order = call("sample", f"--stage={sr}", f"--stage={base}", *ask)
    assert wrong_order.returncode == 1
    assert "in order, base first" in error(wrong_order)
    nowhere = call("sample", f"--stage={tmp_path / 'none'}", *ask)
    assert nowhere.returncode == 1
    assert "has no config.json" in error(nowhere)
    assert not output.exists()


@pytest.mark.slow
def test_a_run_is_not_continued_with_what_differs(cascade, tmp_path):
    """Another config, and the same records embedded by another encoder."""
    records, base, _ = cascade
    before = sorted(path.name for path in base.rglob("*"))
    other = train("base", base, records, "--config.optimizer.learning_rate=0.5")
    assert other.returncode == 1
    assert "optimizer.learning_rate: 0.003 -> 0.5" in error(other)
    copy = tmp_path / "records"
    copy.mkdir()
    for path in records.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["encoder"] = "tiny@v0"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    encoder = train("base", base, copy)
    assert encoder.returncode == 1
    assert "text.encoder: 'tiny@v2-seed0-2x64' -> 'tiny@v0'" in error(encoder)
    assert sorted(path.name for path in base.rglob("*")) == before


@pytest.mark.slow
def test_bad_calls_of_train(tmp_path):
    records = tmp_path / "none"
    missing = train("base", tmp_path / "run", records)
    assert missing.returncode == 1 and "there is no" in error(missing)
    misspelt = train(
        "base", tmp_path / "run", records, "--config.optimizer.learning_rat=1.0"
    )
    assert misspelt.returncode == 2
    assert "learning_rate" in error(misspelt).replace("learning_rat ", "")
    variant = train("bose", tmp_path / "run", records)
    assert variant.returncode == 2 and ":base or :sr" in error(variant)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Records that are read without TensorFlow, which takes long to import."""
    path = tmp_path_factory.mktemp("npz") / "records.npz"
    prepare("shapes:16", str(path), image_size=16, text_length=16, progress=False)
    return path


def training(workdir: Path, records: Path, *more: str) -> list[str]:
    """The command of an endless training; its programs are the same in all tests."""
    return [
        *(sys.executable, "-m", "imagen_jax.train"),
        *("--config=configs/tiny.py:base", f"--workdir={workdir}"),
        f"--config.data.records={records}",
        *once(*TINY, *ENDLESS, *more),
    ]


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves_with_status_3(cascade, tmp_path):
    """Until then no other run gets the workdir."""
    records, _, _ = cascade
    workdir = tmp_path / "run"
    command = training(workdir, records, "--config.training.log_every_steps=1")
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = workdir / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        second = train("base", workdir, records, *ENDLESS)
        assert second.returncode == 1
        assert f"at work in {workdir} (process {process.pid} on" in error(second)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr[-3000:]
    assert "saving ..." in stderr and "saved in" in stderr and "error" not in stderr
    assert list((workdir / "checkpoints").iterdir())


# Takes the size of a file system, a folder to mount it at, and a command.
SMALL_DISK = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'


@pytest.mark.slow
def test_a_small_disk_is_full(npz, tmp_path):
    """A file system of 3 MiB: checkpoints take 0.3, and none is removed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    small = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK]
    small += ["3m", str(disk)]
    if not shutil.which("unshare") or subprocess.run([*small, "true"]).returncode:
        pytest.skip("no file systems can be mounted here")
    often = "--config.training.checkpoint_every_steps=2"
    keeping = "--config.training.keep_checkpoints=1000"
    command = training(disk / "run", npz, often, keeping)
    done = subprocess.run(
        [*small, *command], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr[-3000:]
    said = error(done)
    assert re.search("No space left|the disk of .* is full", said)
    assert said.count("\n") == 1, done.stderr[-3000:]
    assert re.search("start (the same command )?again", said)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [8, 60])
def test_no_room_for_a_run_is_one_line(npz, tmp_path, kib):
    """For its logs or its checkpoints: no file may be longer."""
    lines = "--config.training.log_every_steps=1"
    often = "--config.training.checkpoint_every_steps=20"
    command = training(tmp_path / "run", npz, lines, often)
    # Programs of the cache are used; one that is added to it would be cut.
    environ = environment() | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": str(2**40)}
    limited = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *command]
    done = subprocess.run(
        limited, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    said = error(done)
    assert done.returncode == 1 and "File too large" in said
    assert said.count("\n") == 1 and "start the same command again" in said


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--what=compile", "--topology=v4-521"], 1, "did you mean 'v4-512'"),
        (["--what=train", "--topology=v4-512"], 1, "--topology is for --what=compile"),
        (["--what=params", "--json=nowhere/a.json"], 1, "a folder that exists"),
        (["--what=speed"], 2, "one of"),
    ],
)
def test_benchmark_refuses_what_it_cannot_measure(arguments, status, message):
    done = call("benchmark", "--config=configs/tiny.py:base", *arguments)
    assert done.returncode == status
    assert message in error(done)


def test_benchmark_counts_parameters(tmp_path):
    path = tmp_path / "figures.json"
    done = call(
        "benchmark",
        "--config=configs/tiny.py:sr",
        "--what=params",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(path.read_text())
    assert f"{figures['parameters']:,}" in done.stdout
