import json
import os
import pathlib
import time

import pytest

from imagen_jax import prepare
from imagen_jax.data.manifest import read_manifest
from imagen_jax.data.pipeline import open_records
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError
from tests.data.batches import ids, take

start_tensorflow()
import tensorflow as tf  # noqa: E402

from imagen_jax.data import preprocess  # noqa: E402
from imagen_jax.data import records as reading  # noqa: E402


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Forty scenes in one file."""
    path = str(tmp_path_factory.mktemp("line") / "out")
    options = {"image_size": 8, "shard_examples": 40, "text_length": 8}
    prepare.prepare("shapes:40", path, progress=False, **options)
    return path


def test_resuming_decodes_nothing_that_it_skips(stage, records, mesh, tmp_path):
    """Images of garbage are passed by when they lie before the position."""
    manifest = read_manifest(records)
    shard = manifest.shards[0]["file"]
    task = reading.make_task(records, manifest, 16)
    rows = list(task.source.get_dataset(shuffle=False).as_numpy_iterator())[:12]
    for row in rows[:8]:
        row["image"] = b"no picture"
    reading.write_shard(tmp_path / shard, rows)
    values = json.loads((pathlib.Path(records) / "manifest.json").read_text())
    values["shards"] = [values["shards"][0] | {"examples": 12, "sides": {"64": 12}}]
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"examples": 12}))
    cfg = stage(str(tmp_path), data={"shuffle_examples": 1})
    stream = open_records(cfg, mesh)
    next(stream._batches_from(2))
    with pytest.raises(UserError, match="Unknown image file format|decode"):
        next(stream)


@pytest.mark.parametrize("shuffle", [1, 4, 13])
def test_the_shuffle_buffer_is_as_large_as_the_config_says(stage, line, mesh, shuffle):
    """Of one file, whose numbers rise, none comes before the buffer has reached it."""
    cfg = stage(line, 8, batch_size=5, data={"shuffle_examples": shuffle})
    found = ids(take(open_records(cfg, mesh), 8))
    assert max(id - place for place, id in enumerate(found)) == shuffle - 1


def test_no_more_is_decoded_than_queues_hold(stage, line, mesh, monkeypatch):
    """Five batches with that on the devices, one being filled, and two a thread."""
    whole, decoded = preprocess.picture, []

    def count(data):
        decoded.append(0)
        return data

    def picture(data, *arguments):
        data = tf.ensure_shape(tf.py_function(count, [data], tf.string), [])
        return whole(data, *arguments)

    monkeypatch.setattr(preprocess, "picture", picture)
    cfg = stage(line, 8, batch_size=8)
    stream = open_records(cfg, mesh)
    for taken in (1, 20):
        while stream._consumed < taken:
            next(stream)
        before = -1
        while before != len(decoded):
            before = len(decoded)
            time.sleep(0.5)
        assert len(decoded) <= (taken + 6) * 8 + 2 * min(os.cpu_count(), 32)
