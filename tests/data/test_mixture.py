import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from imagen_jax import prepare
from imagen_jax.data import mixture
from imagen_jax.data.source import open_records
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

start_tensorflow()
from imagen_jax.data.pipeline import make_pipeline  # noqa: E402

DRAWN = 9


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Nine scenes in three files, with int8 embeddings of the same encoder."""
    path = str(tmp_path_factory.mktemp("drawn") / "out")
    options = {"image_size": 32, "shard_examples": 3, "embedding_dtype": "int8"}
    prepare.prepare(f"shapes:{DRAWN}", path, progress=False, **options)
    return path


@pytest.fixture(scope="module")
def mixed(records, drawn):
    """Three of the 21 pictures to one of the nine scenes."""
    return f"{records}:3,{drawn}:1"


def _take(stream, n):
    return [jax.tree.map(np.asarray, b) for b in itertools.islice(stream, n)]


def _rows(batches):
    return {
        int(batch.id[i]): (batch.image[i], batch.text[i], batch.mask[i])
        for batch in batches
        for i in range(len(batch.id))
    }


def _choices(seed, weights, start, count):
    return next(mixture.enter(seed, weights, start, count)[1])


class TestEnter:
    @pytest.mark.parametrize(
        "weights", [(3, 1), (0.7, 0.2, 0.1), (1, 1e-3), (1, 1, 1, 1), (5,), (1e9, 7e8)]
    )
    def test_weights_hold_everywhere(self, weights):
        """Of each part as many as its share, up to 1 + share * parts (docstring)."""
        choices = _choices(0, weights, 0, 20_000)
        places = np.arange(1, len(choices) + 1)
        for part, share in enumerate(np.array(weights) / sum(weights)):
            gap = np.cumsum(choices == part) - places * share
            assert np.abs(gap).max() < 1 + share * len(weights)

    @pytest.mark.parametrize("weights", [(3, 1), (0.7, 0.2, 0.1), (1, 1e-3)])
    @pytest.mark.parametrize("start", [1, 2, 3, 17, 4095, 4096, 4099, 9_999])
    def test_any_position_can_be_entered(self, weights, start):
        whole = _choices(3, weights, 0, start + 9_000)
        np.testing.assert_array_equal(_choices(3, weights, start, 9_000), whole[start:])
        counts = mixture.enter(3, weights, start, 1)[0]
        assert counts == np.bincount(whole[:start], minlength=len(weights)).tolist()

    def test_a_position_after_years_too(self):
        """It is gone to at once: nothing before it is drawn."""
        position, weights = 10**11, (3, 1)
        counts, _ = mixture.enter(0, weights, position, 1)
        choices = _choices(0, weights, position, 1000)
        later, _ = mixture.enter(0, weights, position + 1000, 1)
        assert sum(counts) == position
        assert (np.subtract(later, counts) == np.bincount(choices)).all()

    def test_the_order_is_random_and_of_the_seed(self):
        """Of 3 : 1 the runs of the first part vary in length."""
        choices = _choices(0, (3, 1), 0, 4000)
        assert (choices != _choices(1, (3, 1), 0, 4000)).any()
        gaps = np.diff(np.flatnonzero(choices == 1))
        # Of two numbers even in strata of 4 the difference is triangular on (0, 8).
        assert set(gaps) >= {1, 2, 3, 4, 5, 6, 7} and abs(gaps.mean() - 4) < 0.01

    @pytest.mark.parametrize("count", [1, 7, 4096, 5000])
    def test_arrays_are_as_long_as_is_asked_for(self, count):
        _, arrays = mixture.enter(0, (3, 1), 5, count)
        found = np.stack([next(arrays) for _ in range(3)])
        assert found.shape == (3, count)
        want = _choices(0, (3, 1), 5, 3 * count)
        np.testing.assert_array_equal(found.ravel(), want)


def test_a_mixture_has_what_its_folders_have(stage, records, drawn, mixed, mesh):
    """Pictures, text and masks of each folder, once an epoch of it, by the weights."""
    cfg = stage(mixed, batch_size=4, data={"readers": 1})
    batches = _take(make_pipeline(cfg, mesh), 28)
    ids = np.concatenate([batch.id for batch in batches])
    parts = ids % 2
    assert np.abs(np.cumsum(parts) - np.arange(1, 113) / 4).max() < 1.5
    for part, (path, count) in enumerate([(records, 21), (drawn, DRAWN)]):
        own = ids[parts == part] // 2
        for epoch in range(len(own) // count):
            epoch_ids = own[epoch * count : (epoch + 1) * count]
            assert sorted(epoch_ids) == list(range(count))
        alone = _rows(_take(make_pipeline(stage(path, batch_size=3), mesh), count // 3))
        together = _rows(batches)
        for id, row in alone.items():
            jax.tree.map(np.testing.assert_array_equal, together[id * 2 + part], row)


@pytest.mark.parametrize("consumed", [3, 17])
def test_resuming_equals_never_stopping(stage, mixed, mesh, consumed):
    crop = {"lowres_size": 4, "crop_size": 8}
    whole = open_records(stage(mixed, **crop), mesh)
    _take(whole, consumed)
    state = whole.get_state()
    resumed = open_records(stage(mixed, **crop), mesh)
    resumed.set_state(state)
    have, want = _take(resumed, 4), _take(whole, 4)
    jax.tree.map(np.testing.assert_array_equal, have, want)


def test_small_pictures_are_told_by_folder(stage, mixed, drawn, mesh):
    with pytest.raises(UserError, match=f"all 9 pictures in '{drawn}' are too small"):
        make_pipeline(stage(mixed, 64), mesh)


class TestRefusals:
    @pytest.mark.parametrize("weights", [("", ":1"), (":3", ":0"), (":3", ":much")])
    def test_weights(self, records, drawn, weights):
        given = f"{records}{weights[0]},{drawn}{weights[1]}"
        if "much" in given:
            match = "there is no '.*:much'"
        else:
            match = f"a weight above zero.*{records}:21,{drawn}:9'"
        with pytest.raises(UserError, match=match):
            mixture.read_parts(given)

    def test_a_npz_file(self, records, npz):
        with pytest.raises(UserError, match="out.npz' is a file: only folders"):
            mixture.read_parts(f"{records}:1,{npz}:1")

    def test_the_same_records_twice(self, records):
        with pytest.raises(UserError, match="hold the same records"):
            mixture.read_parts(f"{records}:1,{records}:1")

    @pytest.mark.parametrize("change", [{"encoder": "t5@1"}, {"text_dim": 32}])
    def test_text_of_two_kinds(self, records, drawn, tmp_path, change):
        other = tmp_path / "other"
        shutil.copytree(drawn, other)
        values = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=f"'{records}' and '{other}' cannot be"):
            mixture.read_parts(f"{records}:1,{other}:1")

    def test_a_folder_that_is_not_there(self, records, tmp_path):
        with pytest.raises(UserError, match="there is no '.*/none'"):
            mixture.read_parts(f"{records}:1,{tmp_path}/none:1")

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ("{0}:1,{1}:1", r"weights \[3.0, 1.0\], this run has \[1.0, 1.0\]"),
            ("{1}:3,{0}:1", "data position has records"),
            ("{0}", "data position has records"),
        ],
    )
    def test_a_state_of_another_mixture(
        self, stage, records, drawn, mixed, mesh, other, message
    ):
        state = make_pipeline(stage(mixed), mesh).get_state()
        changed = make_pipeline(stage(other.format(records, drawn)), mesh)
        with pytest.raises(UserError, match=message):
            changed.set_state(state)


def test_a_comma_in_the_name_of_a_folder(drawn, tmp_path):
    path = str(tmp_path / "a:1,b:2")
    shutil.copytree(drawn, path)
    assert [part.path for part in mixture.read_parts(path)] == [path]
