"""Checkpoints: damage is found, named and passed over; which of them stay."""

import dataclasses
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.api.cascade import open_stages
from imagen_jax.config import MeshConfig, TrainingConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import make_mesh
from imagen_jax.training import checksums
from imagen_jax.training.checkpoint import RESUMED, SAMPLED, Checkpointer
from imagen_jax.training.state import create_state
from tests import tiny

CFG = tiny.stage(model=tiny.ONE_LEVEL)


@functools.cache
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def first():
    return create_state(CFG, mesh())


def state(step):
    """Numbers that differ from leaf to leaf and from step to step."""
    rng = np.random.default_rng(step)

    def draw(leaf):
        drawn = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(drawn, leaf.sharding)

    return jax.tree.map(draw, first()).replace(step=jax.numpy.int32(step))


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def save(workdir, steps, training=CFG.training, metrics=None):
    checkpointer = Checkpointer(str(workdir), training)
    for step in steps:
        own = metrics[step] if metrics else None
        checkpointer.save(state(step), CFG, b"at %d" % step, own)
        # Else the next would be saved after what it deletes was counted.
        checkpointer.manager.wait_until_finished()
    checkpointer.close()


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


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder):
    """Of the files with numbers of arrays, the one with the most."""
    return max(folder.glob("ocdbt.process_*/d/*"), key=lambda p: p.stat().st_size)


def test_damage_to_any_file_is_found_and_named(workdir):
    folder = workdir / "checkpoints/2"
    files = [p for item in RESUMED for p in (folder / item).rglob("*") if p.is_file()]
    assert len(files) > 20 and not checksums.faults(folder, RESUMED)
    for path in files:
        good = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        for damage in (flip, truncate, type(path).unlink):
            damage(path)
            (fault,) = checksums.faults(folder, RESUMED)
            assert fault.startswith(f"{name} ")
            # Sampling is not held up by what it does not read.
            sampled = name.split("/")[0] in SAMPLED
            assert bool(checksums.faults(folder, SAMPLED)) == sampled
            path.write_bytes(good)
    assert not checksums.faults(folder, RESUMED)
    flip(files[0])
    found = [checksums.faults(folder, RESUMED, part, 3) for part in range(3)]
    assert sum(map(len, found)) == 1


def test_orbax_alone_reads_a_flipped_byte_as_another_number(tmp_path):
    """Why there are checksums: when this fails, they may go.

    Random bits do not compress, so a chunk has them as they are and can be found.
    """
    bits = np.random.default_rng(0).integers(2**31, size=1024, dtype=np.int32)
    one = {"a": jax.numpy.asarray(bits)}
    checkpointer = Checkpointer(str(tmp_path), CFG.training)
    checkpointer.save(dataclasses.replace(small(1), ema=one), CFG, b"")
    checkpointer.close()
    chunks = (tmp_path / "checkpoints/1/ema").glob("ocdbt.process_*/d/*")
    (path,) = (p for p in chunks if bits.tobytes() in p.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(bits.tobytes())] ^= 0x10
    path.write_bytes(content)
    checkpointer = Checkpointer(str(tmp_path))
    found = checkpointer.ema(jax.eval_shape(lambda: one), 1)["a"]
    assert found[0] == bits[0] ^ 0x10 and (found[1:] == bits[1:]).all()
    with pytest.raises(UserError, match="has changed since it was written"):
        checkpointer.newest()


def half_deleted(folder):
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "verification")


DAMAGES = {
    "flipped": lambda f: flip(largest(f / "train")),
    "truncated": lambda f: truncate(largest(f / "ema")),
    "missing": lambda f: largest(f / "train").unlink(),
    "half deleted": half_deleted,
    "empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    "bad metadata": lambda f: (f / "config/metadata").write_text("{"),
    "version flipped": lambda f: (f / "config/metadata").write_text(
        (f / "config/metadata").read_text().replace('n": 2', 'n": 3')
    ),
    "bad list": lambda f: (f / "verification/files.json").write_text("[" * 100_000),
    "pipe for a list": lambda f: (
        (f / "verification/files.json").unlink(),
        os.mkfifo(f / "verification/files.json"),
    ),
    "pipe for a file": lambda f: (
        (f / "config/metadata").unlink(),
        os.mkfifo(f / "config/metadata"),
    ),
    "bad root": lambda f: (f / "_CHECKPOINT_METADATA").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(workdir, capsys, damage):
    folder = workdir / "checkpoints/2"
    DAMAGES[damage](folder)
    checkpointer = Checkpointer(str(workdir))
    if damage == "bad root":
        # It says when a checkpoint was made; nothing is read by it.
        assert checkpointer.newest() == 2
        return
    assert checkpointer.newest() == 1
    warning = capsys.readouterr().err.strip()
    assert warning.startswith(f"warning: checkpoint 2 of {workdir} is damaged: ")
    assert warning.endswith("it is passed over for 1") and "\n" not in warning
    # What only reads changes nothing.
    assert folder.exists()
    checkpointer.close()


def test_a_run_goes_on_from_the_checkpoint_before(workdir):
    """And saves the same step again, beside what is kept of the damaged one."""
    flip(largest(workdir / "checkpoints/2/train"))
    kept = (workdir / "checkpoints/2/config/metadata").read_bytes()
    checkpointer = Checkpointer(str(workdir), CFG.training)
    assert checkpointer.newest() == 1
    restored, position = checkpointer.restore(CFG, mesh())
    assert equal(restored, state(1)) and position == b"at 1"
    assert list(checkpointer.damaged) == [2]
    checkpointer.save(state(2), CFG, b"again")
    checkpointer.close()
    assert (workdir / "damaged/2/config/metadata").read_bytes() == kept
    checkpointer = Checkpointer(str(workdir))
    restored, position = checkpointer.restore(CFG, mesh())
    assert equal(restored, state(2)) and position == b"again"


def test_sampling_takes_the_newest_whole_average(workdir, capsys):
    """Damage elsewhere in a checkpoint is no reason to take an older one."""
    flip(largest(workdir / "checkpoints/2/train"))
    assert open_stages([str(workdir)])[0].step == 2
    assert not capsys.readouterr().err
    flip(largest(workdir / "checkpoints/2/ema"))
    (stage,) = open_stages([str(workdir)])
    assert stage.step == 1 and "checkpoint 2" in capsys.readouterr().err
    assert equal(stage.load(mesh()).params, state(1).ema)


def test_when_none_is_whole_it_says_what_to_do(workdir):
    flip(largest(workdir / "checkpoints/2/ema"))
    half_deleted(workdir / "checkpoints/1")
    for training in (None, CFG.training):
        with pytest.raises(UserError) as found:
            Checkpointer(str(workdir), training).newest()
        message = str(found.value)
        assert "\n  2: ema/ocdbt.process_0/d/" in message
        assert "\n  1: verification/files.json is missing" in message
        assert "Copy one of them again" in message and "new --workdir" in message
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"1", "2"}


@pytest.mark.parametrize("version", [1, 3, "x", None])
def test_another_schema_version_is_refused(workdir, monkeypatch, version):
    """It is not damage: an older checkpoint is not taken in its place."""
    path = workdir / "checkpoints/2/config/metadata"
    described = json.loads(path.read_text())
    described["schema_version"] = version
    if version is None:
        del described["schema_version"]
    if version == 1:
        # As a release before this one wrote it, without checksums.
        shutil.rmtree(workdir / "checkpoints/2/verification")
    path.write_text(json.dumps(described))
    listed = workdir / "checkpoints/2/verification/files.json"
    if listed.exists():
        sums = json.loads(listed.read_text())
        sums["config/metadata"] = checksums._sum(path)
        listed.write_text(json.dumps(sums))
    has = f"schema version {version}" if version else "no schema version"
    with pytest.raises(UserError, match=f"{has}, this program reads 2: use the rel"):
        Checkpointer(str(workdir)).newest()


def test_a_checkpoint_knows_what_it_is(saved):
    checkpointer = Checkpointer(str(saved))
    described = checkpointer._description(2)
    assert described["schema_version"] == 2 and described["step"] == 2
    assert checkpointer.stage() == CFG and CFG.text.encoder == "fake@1"
    assert set(described["written_by"]) == {"imagen_jax", "jax"}


LOSSES = {1: 0.5, 2: 0.2, 3: 0.4, 4: 0.3, 5: float("nan"), 6: 0.9, 7: 0.8}


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, {6, 7}),
        ({"keep_every_steps": 3}, {3, 6, 7}),
        ({"keep_best_checkpoints": 2}, {2, 4, 6, 7}),
        ({"keep_best_checkpoints": 1, "keep_every_steps": 5}, {2, 5, 6, 7}),
        ({"keep_best_checkpoints": 1, "best_metric": "other"}, {1, 6, 7}),
    ],
)
def test_which_checkpoints_stay(tmp_path, monkeypatch, training, steps):
    """The newest two, multiples, and the lowest of a metric; never by what is NaN."""
    # What is deleted depends on no array.
    monkeypatch.setattr(
        "tests.training.test_checkpoint.state", lambda step: small(step)
    )
    training = TrainingConfig(keep_checkpoints=2, checkpoint_every_steps=1, **training)
    metrics = {n: {"loss": loss, "other": float(n)} for n, loss in LOSSES.items()}
    # Resumed midway: what was measured before counts on.
    save(tmp_path, [1, 2, 3, 4], training, metrics)
    save(tmp_path, [5, 6, 7], training, metrics)
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == steps
    for step in steps:
        assert not checksums.faults(tmp_path / "checkpoints" / str(step), RESUMED)


def small(step):
    one = {"a": jax.numpy.ones(1)}
    return dataclasses.replace(
        first(), step=jax.numpy.int32(step), params=one, ema=one, opt_state=one
    )
