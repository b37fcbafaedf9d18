"""Checkpoints: what is saved, which stay, and damage that is passed over."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import zlib

import jax
import pytest

from imagen_jax.api.cascade import load, open_stages
from imagen_jax.config import TrainingConfig
from imagen_jax.errors import UserError
from imagen_jax.training.checkpoint import Checkpointer
from tests import tiny
from tests.training.checkpoints import (
    CFG,
    assert_equal,
    flip,
    largest,
    mesh,
    save,
    state,
    truncate,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 1 and 2, not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    (workdir / "config.json").write_text("{}")
    save(workdir, [1, 2])
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_a_checkpoint_knows_what_it_is(saved):
    path = saved / "checkpoints/2/config/metadata"
    described = json.loads(path.read_text())
    assert described["schema_version"] == 2 and described["step"] == 2
    assert Checkpointer(str(saved)).stage(2) == CFG and CFG.text.encoder == "fake@1"
    assert set(described["written_by"]) == {"imagen_jax", "jax"}


def test_no_program_is_compiled_for_a_save(tmp_path, caplog):
    """Of arrays that each of eight devices holds whole; nothing is told of it."""
    heard, eight = [], state(1, 8)

    def listen(event, seconds, **_):
        heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with contextlib.closing(Checkpointer(str(tmp_path), CFG.training)) as saves:
            saves.save(eight, CFG, b"here")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert heard and not [event for event in heard if "backend_compile" in event]
    assert "overriding" not in caplog.text
    with contextlib.closing(Checkpointer(str(tmp_path))) as saved:
        assert_equal(saved.restore(CFG, mesh(8), 1)[0], eight)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_the_state_may_be_donated_while_it_is_written(tmp_path, devices):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    like = state(3, devices)
    own, want = like.params, jax.device_get(like.params)
    checkpointer = Checkpointer(str(tmp_path), CFG.training)
    checkpointer.save(like.replace(params=own, ema=own), CFG, b"here")
    for _ in range(3):
        own = spoil(own)
    jax.block_until_ready(own)
    checkpointer.wait()
    # Whatever mesh it was saved from, it is restored on any other.
    found, position = checkpointer.restore(CFG, mesh(9 - devices), 3)
    assert_equal(found.params, want)
    assert_equal(found.opt_state, like.opt_state)
    assert position == b"here" and int(found.step) == 3
    checkpointer.close()


DAMAGES = {
    "flipped": lambda f: flip(largest(f / "train")),
    "truncated": lambda f: truncate(largest(f / "ema")),
    "missing": lambda f: largest(f / "train").unlink(),
    "half deleted": lambda f: (shutil.rmtree(f / "train"), shutil.rmtree(f / "config")),
    "no checksums": lambda f: (f / "verification/files.json").unlink(),
    "empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    "flipped version": lambda f: (f / "config/metadata").write_text(
        (f / "config/metadata").read_text().replace('n": 2', 'n": 3')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(workdir, capsys, damage):
    folder = workdir / "checkpoints/2"
    DAMAGES[damage](folder)
    checkpointer = Checkpointer(str(workdir))
    assert checkpointer.newest() == 1
    warning = capsys.readouterr().err.strip()
    assert warning.startswith(f"warning: checkpoint 2 of {workdir} is damaged: ")
    assert warning.endswith("it is passed over for 1") and "\n" not in warning
    # Reading changes nothing.
    assert folder.exists()


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before(workdir):
    """And saves the same step again, beside what is kept of the damaged one."""
    for number in (1, 2):
        flip(largest(workdir / "checkpoints/2/train"))
        checkpointer = Checkpointer(str(workdir), CFG.training)
        assert checkpointer.newest() == 1
        restored, position = checkpointer.restore(CFG, mesh(), 1)
        assert_equal(restored, state(1))
        assert position == b"at 1" and list(checkpointer.damaged) == [2]
        checkpointer.save(state(2), CFG, b"again")
        checkpointer.close()
        assert len(list((workdir / "damaged").glob("2*/config/metadata"))) == number
    checkpointer = Checkpointer(str(workdir))
    restored, position = checkpointer.restore(CFG, mesh(), checkpointer.newest())
    assert_equal(restored, state(2))
    assert position == b"again"


def test_sampling_takes_the_newest_undamaged_average(workdir, capsys):
    """Damage elsewhere in a checkpoint is no reason to take an older one."""
    flip(largest(workdir / "checkpoints/2/train"))
    assert open_stages([str(workdir)])[0].step == 2
    assert not capsys.readouterr().err
    flip(largest(workdir / "checkpoints/2/ema"))
    (stage,) = open_stages([str(workdir)])
    assert stage.step == 1 and "checkpoint 2" in capsys.readouterr().err
    assert_equal(load(stage, mesh()).params, state(1).ema)


def test_when_all_are_damaged_it_says_what_to_do(workdir):
    flip(largest(workdir / "checkpoints/2/ema"))
    (workdir / "checkpoints/1/verification/files.json").unlink()
    for training in (None, CFG.training):
        with pytest.raises(UserError) as found:
            Checkpointer(str(workdir), training).newest()
        message = str(found.value)
        assert "(2: ema/ocdbt.process_0/d/" in message
        assert "; 1: verification/files.json is missing" in message
        assert "copy one of them again" in message and "new --workdir" in message
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"1", "2"}


@pytest.mark.parametrize("version", [1, 3, None])
def test_another_schema_version_is_refused(workdir, version):
    """It is not damage: an older checkpoint is not taken in its place."""
    path = workdir / "checkpoints/2/config/metadata"
    described = json.loads(path.read_text()) | {"schema_version": version}
    path.write_text(json.dumps(described))
    listed = workdir / "checkpoints/2/verification/files.json"
    content = path.read_bytes()
    sums = json.loads(listed.read_text())
    sums["config/metadata"] = len(content), zlib.crc32(content)
    listed.write_text(json.dumps(sums))
    with pytest.raises(UserError, match=f"version {version}, this program reads 2: us"):
        Checkpointer(str(workdir)).newest()


def test_a_checkpoint_of_another_stage_is_refused(workdir):
    """Copied into this run's workdir, say."""
    other = tiny.stage(model=tiny.ONE_LEVEL | {"channels": (16,)})
    with pytest.raises(UserError, match="checkpoint 2 of .* is not one of this stage"):
        Checkpointer(str(workdir)).restore(other, mesh(), 2)
    deeper = tiny.stage(model=tiny.ONE_LEVEL | {"num_res_blocks": (2,)})
    with pytest.raises(UserError, match="checkpoint 2 of .* is not one of this stage"):
        Checkpointer(str(workdir)).restore(deeper, mesh(), 2)


def test_a_full_disk_is_one_error_and_older_checkpoints_stay(workdir):
    """Told by the next save or at the end; files of at most 9 kB are a full disk."""
    checkpointer = Checkpointer(str(workdir), CFG.training)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))
        with pytest.raises(UserError) as found:
            checkpointer.save(state(3), CFG, b"")
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(found.value)
    assert message.startswith(f"a checkpoint of {workdir} cannot be written (")
    assert os.strerror(errno.EFBIG) in message
    assert "start the same command again" in message
    checkpointer.close()
    assert Checkpointer(str(workdir)).newest() == 2


def test_what_a_killed_run_left_unfinished_is_removed(workdir):
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    save(workdir, [3])
    assert {p.name for p in folder.iterdir()} == {"1", "2", "3"}


LOSSES = {1: 0.5, 2: 0.2, 3: 0.4, 4: 0.3, 5: float("nan"), 6: 0.9, 7: 0.8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, {6, 7}),
        ({"keep_every_steps": 3}, {3, 6, 7}),
        ({"keep_best_checkpoints": 2}, {2, 4, 6, 7}),
        ({"keep_best_checkpoints": 1, "best_metric": "other"}, {1, 6, 7}),
    ],
)
def test_which_checkpoints_stay(tmp_path, training, steps):
    """The newest two, multiples, and the lowest of a metric; never by what is NaN."""
    training = TrainingConfig(keep_checkpoints=2, checkpoint_every_steps=1, **training)
    one = {"a": jax.numpy.ones(1)}
    small = dataclasses.replace(state(0), params=one, ema=one, opt_state=one)
    # Resumed midway: what was measured before counts on.
    for resumed in ((1, 2, 3, 4), (5, 6, 7)):
        checkpointer = Checkpointer(str(tmp_path), training)
        for step in resumed:
            metrics = {"loss": LOSSES[step], "other": float(step)}
            now = small.replace(step=jax.numpy.int32(step))
            checkpointer.save(now, CFG, b"", metrics)
        checkpointer.close()
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == steps
