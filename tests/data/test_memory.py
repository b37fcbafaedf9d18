import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax import config, sharding
from imagen_jax.batch import batch_spec, check_batch
from imagen_jax.data.memory import make_memory
from imagen_jax.data.source import open_records
from imagen_jax.errors import UserError


def _take(stream, n):
    return [jax.tree.map(np.asarray, b) for b in itertools.islice(stream, n)]


def _ids(batches):
    return np.concatenate([batch.id for batch in batches]).tolist()


def test_every_epoch_is_another_permutation(stage, npz, mesh):
    cfg = stage(npz, batch_size=5)
    stream = open_records(cfg, mesh)
    check_batch(next(stream), batch_spec(cfg))
    epochs = [_ids(_take(make_memory(cfg, mesh), 9)[i : i + 3]) for i in (0, 3, 6)]
    for ids in epochs:
        assert sorted(ids) == [i for i in range(21) if i % 7 not in (4, 6)]
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    other = make_memory(stage(npz, batch_size=5, data={"seed": 1}), mesh)
    assert _ids(_take(other, 3)) != epochs[0]


@pytest.mark.parametrize("consumed", [0, 2, 9])
def test_resuming_equals_never_stopping(stage, npz, mesh, consumed):
    cfg = stage(npz, lowres_size=4, crop_size=8)
    whole = make_memory(cfg, mesh)
    _take(whole, consumed)
    resumed = make_memory(cfg, mesh)
    resumed.set_state(whole.get_state())
    have, want = _take(resumed, 5), _take(whole, 5)
    jax.tree.map(np.testing.assert_array_equal, have, want)
    assert resumed.get_state() == whole.get_state()


def test_hosts_hold_the_rows_of_one_batch(stage, npz, mesh):
    """Any number of hosts sees the same global batches, also in later epochs."""
    cfg = stage(npz, batch_size=4)
    whole = _take(make_memory(cfg, mesh), 9)
    halves = np.arange(4).reshape(2, 2)
    parts = [_take(make_memory(cfg, mesh, rows), 9) for rows in halves]
    for batch, *joined in zip(whole, *parts):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *joined)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_a_batch_larger_than_the_data_is_filled_from_later_epochs(stage, npz, mesh):
    (batch,) = _take(make_memory(stage(npz, batch_size=40), mesh), 1)
    counts = np.bincount(batch.id)
    assert set(counts[counts > 0]) == {2, 3}


def test_needs_no_tensorflow(stage, npz):
    cfg = stage(npz)
    program = f"""
import sys
for name in ("tensorflow", "seqio", "tensorflow_datasets", "absl.app"):
    sys.modules[name] = None
import jax
from imagen_jax import config, sharding
from imagen_jax.data.source import open_records
cfg = config.from_json({config.to_json(cfg)!r})
mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
print(next(open_records(cfg, mesh)).image.shape)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert out.stdout.strip() == "(4, 16, 16, 3)", out.stderr


@pytest.mark.parametrize("size", [64, 24])
def test_sizes_that_do_not_halve(stage, npz, mesh, size):
    with pytest.raises(UserError, match=f"of 32 pixels, .*--image_size={size}"):
        make_memory(stage(npz, size), mesh)


def test_another_encoder(stage, npz, mesh):
    cfg = dataclasses.replace(stage(npz), text=config.TextConfig(8, 64, "x@1"))
    with pytest.raises(UserError, match="'tiny@.*is 'x@1'"):
        open_records(cfg, mesh)


def test_a_batch_lies_over_the_mesh(stage, npz):
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=2), jax.devices()[:4])
    batch = next(make_memory(stage(npz, batch_size=8), mesh))
    assert {s.data.shape for s in batch.text.addressable_shards} == {(2, 8, 64)}


def test_the_file_holds_captions_and_no_pickles(npz, pictures):
    with np.load(npz, allow_pickle=False) as file:
        captions, ids = file["caption"], file["id"]
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    want = [json.loads(lines[i])["text"].strip() for i in ids]
    assert captions.tolist() == want


def test_has_middle_squares_only(stage, npz, mesh):
    with pytest.raises(UserError, match="data.square is 'random', but .*middle squ"):
        make_memory(stage(npz, data={"square": "random"}), mesh)
