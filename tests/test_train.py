"""The door that trains: longer runs, failed starts, and what it tells."""

import json
import shlex
import shutil

import pytest

from tests.test_doors import TINY, call, error, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Records, and a base that was trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    records = folder / "records.npz"
    words = ("--source=shapes:16", "--image_size=16", "--text_length=16")
    done = call("prepare", *words, f"--output={records}")
    assert done.returncode == 0, done.stderr[-3000:]
    done = train("base", folder / "base", records)
    assert done.returncode == 0, done.stderr[-3000:]
    return records, folder / "base"


@pytest.mark.slow
def test_more_steps_learn(trained, tmp_path):
    """Resumed after its last step, a stage has a rate above 0; the page follows."""
    records, base = trained
    workdir = tmp_path / "base"
    shutil.copytree(base, workdir)
    flags = [f for f in TINY if ".steps=2" not in f or "sampler" in f]
    flags.append("--config.training.steps=4")
    command = ["--config=configs/tiny.py:base", f"--workdir={workdir}", *flags]
    records = f"--config.data.records={records}"
    ends = "--config.optimizer.decay_steps=200"
    other = call("train", *command, records, ends)
    assert other.returncode == 1 and "decay_steps: 0 -> 200" in error(other)
    done = call("train", *command, records)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 4
    assert json.loads(rows[-1])["learning_rate"] > 0
    assert "step 4 of 4; done" in (workdir / "index.html").read_text()
    # Nothing but the bar on stderr, and the next command at the end.
    assert "arning" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    *_, told, following = done.stdout.splitlines()
    assert told.startswith("done: checkpoints/, samples/ and index.html are in")
    words = shlex.split(following.removeprefix("python -m imagen_jax."))
    sampled = call(*words[:3], f"--output={tmp_path / 'samples'}")
    assert sampled.returncode == 0, sampled.stderr[-3000:]
    assert "read only" not in sampled.stderr


@pytest.mark.slow
def test_a_failed_first_start_leaves_the_workdir_free(trained, tmp_path):
    records, workdir = trained[0], tmp_path / "run"
    failed = train("base", workdir, records, "--config.training.init_from=/nowhere")
    assert failed.returncode == 1 and "/nowhere has no config.json" in error(failed)
    assert (workdir / "config.json").exists()
    flags = ["--config.optimizer.learning_rate=0.5"]
    flags += ["--config.training.sample_every_steps=0"]
    done = train("base", workdir, records, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
