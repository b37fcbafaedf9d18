import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax import config, sharding
from imagen_jax.batch import batch_spec, check_batch
from imagen_jax.data.memory import read_captions
from imagen_jax.data.pipeline import open_records
from imagen_jax.errors import UserError
from tests.data.batches import assert_equal, ids, take
from tests.npz import captions


def test_every_epoch_is_another_permutation(stage, npz, mesh):
    cfg = stage(npz, batch_size=5)
    batches = take(open_records(cfg, mesh), 9)
    check_batch(batches[0], batch_spec(cfg))
    epochs = [ids(batches[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == [i for i in range(21) if i % 7 not in (4, 6)]
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    other = open_records(stage(npz, batch_size=5, data={"seed": 1}), mesh)
    assert ids(take(other, 3)) != epochs[0]


@pytest.mark.slow
def test_the_first_have_captions_and_nothing_moves(stage, npz, records, mesh):
    """Of both kinds of records."""
    stored = [f"picture {i}, {'so ' * (i % 5)}".strip() for i in range(21)]
    for path in (npz, records):
        batch, *want = take(open_records(stage(path, batch_size=6), mesh), 4)
        stream = open_records(stage(path, batch_size=6), mesh)
        assert_equal([stream.first(4)], [stream.first(4)])
        found = take(stream, 2)
        before, first = stream.get_state(), stream.first(4)
        assert stream.get_state() == before
        found += take(stream, 2)
        assert_equal(found, [batch, *want])
        assert [c.decode() for c in first.caption] == [stored[i] for i in first.id]
        for name in ("id", "image", "text", "mask"):
            want = getattr(batch, name)[:4]
            np.testing.assert_array_equal(getattr(first, name), want)
        assert batch.caption is None


def test_captions_that_cannot_be_read_are_empty(npz, tmp_path):
    with np.load(npz) as file:
        arrays = dict(file)
    assert read_captions(npz, 15)[1].decode().startswith("picture 1")
    path, last = tmp_path / "x.npz", len(arrays["caption"])
    for offset in ([0, last + 9], [0, -5], [9, 2**62]):
        np.savez(path, caption=arrays["caption"], caption_offset=np.array(offset, "i8"))
        assert read_captions(str(path), 1) == [b""]
    np.savez(path, caption=np.array(["as release 0.2 wrote them"]))
    assert read_captions(str(path), 1) == [b""]


@pytest.mark.parametrize("consumed", [0, 2, 9])
def test_resuming_equals_never_stopping(stage, npz, mesh, consumed):
    cfg = stage(npz, lowres_size=4, crop_size=8)
    whole = open_records(cfg, mesh)
    take(whole, consumed)
    resumed = open_records(cfg, mesh)
    resumed.set_state(whole.get_state())
    assert_equal(take(resumed, 5), take(whole, 5))
    assert resumed.get_state() == whole.get_state()


def test_hosts_hold_the_rows_of_one_batch(stage, npz, mesh):
    """Any number of hosts sees the same global batches, also in later epochs."""
    cfg = stage(npz, batch_size=4)
    whole = take(open_records(cfg, mesh), 9)
    halves = np.arange(4).reshape(2, 2)
    parts = [take(open_records(cfg, mesh, rows), 9) for rows in halves]
    joined = [
        jax.tree.map(lambda *x: np.concatenate(x), *batches) for batches in zip(*parts)
    ]
    assert_equal(joined, whole)


def test_a_batch_larger_than_the_data_is_filled_from_later_epochs(stage, npz, mesh):
    (batch,) = take(open_records(stage(npz, batch_size=40), mesh), 1)
    counts = np.bincount(batch.id)
    assert set(counts[counts > 0]) == {2, 3}


def test_needs_no_tensorflow(stage, npz):
    cfg = stage(npz)
    program = f"""
import json, sys
for name in ("tensorflow", "seqio", "tensorflow_datasets", "absl.app"):
    sys.modules[name] = None
import jax
from imagen_jax import config, sharding
from imagen_jax.data.pipeline import open_records
cfg = config.from_dict(json.loads({config.to_json(cfg)!r}))
mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
print(next(open_records(cfg, mesh)).image.shape)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert out.stdout.strip() == "(4, 16, 16, 3)", out.stderr


@pytest.mark.parametrize(
    ("size", "message"),
    [(64, "all 15 images .*largest has 32 pixels"), (24, "of 32 .*--image_size=24")],
)
def test_sizes_that_do_not_halve(stage, npz, mesh, size, message):
    with pytest.raises(UserError, match=message):
        open_records(stage(npz, size), mesh)


def test_a_batch_lies_over_the_mesh(stage, npz):
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=2), jax.devices()[:4])
    batch = next(open_records(stage(npz, batch_size=8), mesh))
    assert {s.data.shape for s in batch.text.addressable_shards} == {(2, 8, 64)}


def test_the_file_holds_captions_and_no_pickles(npz, pictures):
    with np.load(npz, allow_pickle=False) as file:
        numbers = file["id"]
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    want = [json.loads(lines[i])["text"].strip() for i in numbers]
    assert captions(npz) == want


def test_has_middle_squares_only(stage, npz, mesh):
    with pytest.raises(UserError, match="data.square is 'random', but .*middle squ"):
        open_records(stage(npz, data={"square": "random"}), mesh)
