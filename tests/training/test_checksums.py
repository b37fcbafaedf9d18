"""Checksums: damage to any file of a checkpoint is found and named."""

import dataclasses

import jax
import numpy as np
import pytest

from imagen_jax.training import checksums
from imagen_jax.training.checkpoint import RESUMED, SAMPLED, Checkpointer
from tests.training.checkpoints import CFG, flip, save, state, truncate


@pytest.mark.slow
def test_damage_to_any_file_is_found_and_named(tmp_path):
    save(tmp_path, [2])
    folder = tmp_path / "checkpoints/2"
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
    """The reason for our checksums: when this fails, they may go.

    Random bits do not compress, so a chunk has them as they are and can be found.
    """
    bits = np.random.default_rng(0).integers(2**31, size=1024, dtype=np.int32)
    one = {"a": jax.numpy.asarray(bits)}
    small = dataclasses.replace(state(1), params=one, ema=one, opt_state=one)
    checkpointer = Checkpointer(str(tmp_path), CFG.training)
    checkpointer.save(small, CFG, b"")
    checkpointer.close()
    chunks = (tmp_path / "checkpoints/1/ema").glob("ocdbt.process_*/d/*")
    (path,) = (p for p in chunks if bits.tobytes() in p.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(bits.tobytes())] ^= 0x10
    path.write_bytes(content)
    checkpointer = Checkpointer(str(tmp_path))
    found = checkpointer.ema(jax.eval_shape(lambda: one), 1)["a"]
    assert found[0] == bits[0] ^ 0x10 and (found[1:] == bits[1:]).all()
    (fault,) = checksums.faults(tmp_path / "checkpoints/1", RESUMED)
    assert fault.startswith(f"ema/ocdbt.process_0/d/{path.name} has changed")


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{"])
def test_a_list_that_cannot_be_read(tmp_path, content):
    (tmp_path / "verification").mkdir()
    if content is not None:
        (tmp_path / "verification/files.json").write_bytes(content)
    (fault,) = checksums.faults(tmp_path, RESUMED)
    assert fault == "verification/files.json is missing or damaged"
