"""Records that are left out of training, by score or by number, against plain loops."""

import csv
import itertools
import math
import shutil

import jax
import numpy as np
import pytest

from imagen_jax import config, prepare, sharding
from imagen_jax.data import choice
from imagen_jax.data.manifest import Source, read_manifest
from imagen_jax.data.pipeline import open_records, read_heldout
from imagen_jax.errors import UserError
from tests.data.batches import assert_equal, ids, take

COUNT = 48
RNG = np.random.default_rng(5)
AESTHETIC = RNG.integers(0, 21, COUNT) / 2  # many of them equal
NSFW = RNG.random(COUNT).astype(np.float32).astype(float)
AESTHETIC[7] = NSFW[9] = NSFW[20] = math.nan
FILTER = ("aesthetic>=5", "nsfw < 0.75")
KEPT = {i for i in range(COUNT) if float(AESTHETIC[i]) >= 5 and float(NSFW[i]) < 0.75}
SHARE = 0.25
OPTIONS = {"text_length": 8, "image_size": 16, "progress": False}


def _held_out(i, share=SHARE):
    """In plain integers what `order.draw` says of a number, with seed and epoch 0."""
    prime, mixed = 2**31 - 1, 0
    for value in (i, 0, 5):
        mixed = pow((mixed * 48271 + value % prime + 1) % prime, 5, prime)
    return mixed < int(share * prime)


HELD_OUT = {i for i in range(COUNT) if _held_out(i)}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Scenes with scores: in eight files, and in a .npz file."""
    folder = tmp_path_factory.mktemp("scored")
    with open(folder / "scores.csv", "w", newline="") as file:
        rows = zip(range(COUNT), AESTHETIC, NSFW)
        csv.writer(file).writerows([("id", "aesthetic", "nsfw"), *rows])
    options = OPTIONS | {"scores": str(folder / "scores.csv")}
    prepare.prepare(f"shapes:{COUNT}", str(folder / "out"), shard_examples=6, **options)
    prepare.prepare(f"shapes:{COUNT}", str(folder / "out.npz"), **options)
    return folder


def _source(scored):
    path = str(scored / "out")
    return Source(path, 1.0, read_manifest(path))


def test_the_test_is_of_something():
    assert 8 < len(KEPT) < 24 and 6 < len(HELD_OUT) < 20 and KEPT & HELD_OUT


@pytest.mark.slow
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("name", ["out", "out.npz"])
@pytest.mark.parametrize(
    "data",
    [
        {"filter": FILTER},
        {"heldout_share": SHARE},
        {"filter": FILTER, "heldout_share": SHARE},
    ],
)
def test_three_epochs_have_what_a_plain_filter_leaves(
    stage, scored, mesh, name, data, readers
):
    cfg = stage(str(scored / name), data=data | {"readers": readers})
    left_out = HELD_OUT if "heldout_share" in data else set()
    expected = (KEPT if "filter" in data else set(range(COUNT))) - left_out
    found = ids(take(open_records(cfg, mesh), 3 * COUNT // 4))
    assert set(found) == expected
    if readers == 1:
        # An epoch has as many examples as there are records; each kept one comes as
        # often as others, give or take one.
        epoch = COUNT if name == "out" else len(expected)
        times = [found[:epoch].count(i) for i in expected]
        assert max(times) - min(times) <= 1 and sum(times) == epoch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "out.npz"])
@pytest.mark.parametrize("consumed", [5, 29])
def test_resuming_equals_never_stopping(stage, scored, mesh, name, consumed):
    data = {"filter": FILTER, "heldout_share": SHARE, "readers": 2}
    cfg = stage(str(scored / name), data=data)
    whole = take(open_records(cfg, mesh), consumed + 14)
    first = open_records(cfg, mesh)
    take(first, consumed)
    again = open_records(cfg, mesh)
    again.set_state(first.get_state())
    assert_equal(take(again, 14), whole[consumed:])


def test_without_either_nothing_changes(stage, scored, mesh):
    """The position of a checkpoint that knew neither is that of a run with neither."""
    path = str(scored / "out")
    state = open_records(stage(path), mesh).get_state()
    assert b"filter" not in state and b"heldout" not in state
    for data in ({"filter": FILTER}, {"heldout_share": SHARE}):
        with pytest.raises(UserError, match=f"data.{next(iter(data))}"):
            open_records(stage(path, data=data), mesh).set_state(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_held_out_and_trained_on_share_nothing(stage, scored, mesh, name):
    for data in ({"filter": FILTER, "heldout_share": SHARE}, {"heldout_share": SHARE}):
        cfg = stage(str(scored / name), data=data)
        trained = set(ids(take(open_records(cfg, mesh), 40)))
        held = set(ids(take(open_records(cfg, mesh, heldout=True), 12)))
        own = (KEPT if "filter" in data else set(range(COUNT))) & HELD_OUT
        assert held == own and not held & trained


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_held_out_batches_are_always_the_same(stage, scored, name):
    """Whatever the readers, the buffer and the mesh are."""
    found = []
    for count, data in ((1, {}), (2, {"readers": 2}), (4, {"shuffle_examples": 99})):
        cfg = stage(str(scored / name), data={"heldout_share": SHARE, **data})
        cfg = config.from_dict(
            vars(cfg) | {"training": {"batch_size": 4, "heldout_images": 10}}
        )
        mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:count])
        found.append(take(iter(read_heldout(cfg, mesh)), 9))
    assert len(found[0]) == 3
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.mark.slow
def test_hosts_together_have_the_batches_of_one(stage, scored, mesh):
    cfg = stage(str(scored / "out"), data={"heldout_share": SHARE})
    whole = take(open_records(cfg, mesh, heldout=True), 4)
    for rows in ([0, 1], [2, 3], [1]):
        part = open_records(cfg, mesh, np.array(rows), heldout=True)
        batches = itertools.islice(part._batches_from(0), 4)
        have = [own.id.tolist() for own in batches]
        assert have == [batch.id[rows].tolist() for batch in whole]


def test_a_mixture_holds_out_what_its_folders_do(stage, scored, mesh, tmp_path):
    """Record i of folder k has the number i K + k; each folder is filtered alike."""
    copy = tmp_path / "copy"
    shutil.copytree(scored / "out", copy)
    data = {"filter": FILTER, "heldout_share": SHARE, "readers": 1}
    cfg = stage(f"{scored / 'out'}:1,{copy}:1", data=data)
    found = ids(take(open_records(cfg, mesh), 60))
    for k in range(2):
        assert {i // 2 for i in found if i % 2 == k} == KEPT - HELD_OUT


def test_tensorflow_chooses_what_numpy_does(scored):
    import tensorflow as tf

    data = config.DataConfig(filter=FILTER, heldout_share=0.1)
    numbers = np.random.default_rng(0).integers(0, 2**31, 500)
    scores = {
        "aesthetic": np.random.default_rng(1).integers(0, 9, 500).astype(np.float32),
        "nsfw": np.where(numbers % 5, np.float32(0.75), np.float32(np.nan)),
    }
    for own in (data, config.DataConfig(heldout_share=0.1)):
        for heldout in (False, True):
            is_chosen = choice.choice(own, _source(scored), heldout)
            have = is_chosen(numbers, scores)
            tensors = {name: tf.constant(x) for name, x in scores.items()}
            there = is_chosen(tf.constant(numbers), tensors).numpy()
            np.testing.assert_array_equal(have, there)
    drawn = [_held_out(int(i), 0.1) for i in numbers]
    np.testing.assert_array_equal(have, drawn)
    assert 0.06 < np.mean(drawn) < 0.14


def test_which_are_held_out_is_a_rule_for_ever(scored):
    """Checkpoints rely on it: records that were held out stay so."""
    data = config.DataConfig(heldout_share=0.2)
    is_chosen = choice.choice(data, _source(scored), heldout=True)
    chosen = np.flatnonzero(is_chosen(np.arange(40), {})).tolist()
    assert chosen == [i for i in range(40) if _held_out(i, 0.2)]
    assert chosen[:6] == [5, 13, 20, 24, 26, 29]


@pytest.mark.parametrize("test", ["<", "<=", "==", ">", ">="])
@pytest.mark.parametrize("number", ["5", "5.5", "-1", "1e1", ".5E+1", "5."])
def test_tests(scored, test, number):
    data = config.DataConfig(filter=(f"aesthetic {test} {number}",))
    is_chosen = choice.choice(data, _source(scored))
    have = is_chosen(np.arange(COUNT), {"aesthetic": AESTHETIC.astype(np.float32)})
    expected = [eval(f"x {test} float('{number}')", {"x": x}) for x in AESTHETIC]
    np.testing.assert_array_equal(have, expected)


@pytest.mark.parametrize(
    "text",
    ["aesthetic", "asthetic>=5", "aesthetic>=high", "aesthetic!=5", ">5", "aesthetic>"]
    + ["5<aesthetic", "", "aesthetic>=5 and nsfw<1", "aesthetic=5", "nsfw>1..2"]
    + ["nsfw<nan", "nsfw<1_0", "nsfw<.", "nsfw<1e", "nsfw<<1"],
)
@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_tests_that_cannot_be_read(stage, scored, mesh, text, name):
    cfg = stage(str(scored / name), data={"filter": (text,)})
    with pytest.raises(UserError, match="has the scores: aesthetic, nsfw"):
        open_records(cfg, mesh)


def test_records_without_scores(stage, even, scored, mesh):
    with pytest.raises(UserError, match="has the scores: none"):
        open_records(stage(even, data={"filter": FILTER}), mesh)
    cfg = stage(even, data={"heldout_share": SHARE, "readers": 1})
    assert set(ids(take(open_records(cfg, mesh), 18))) == set(range(24)) - HELD_OUT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "out.npz"])
@pytest.mark.parametrize(
    ("data", "heldout"),
    [
        ({"filter": ("aesthetic>10",)}, False),
        ({"heldout_share": 1e-9}, True),
        ({"heldout_share": 0.9999999}, False),
    ],
)
def test_nothing_left_is_said(stage, scored, mesh, name, data, heldout):
    with pytest.raises(UserError, match="choose no record of"):
        take(open_records(stage(str(scored / name), data=data), mesh, None, heldout), 1)
