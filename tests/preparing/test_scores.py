"""Scores of pictures: from a table or a function into records, and out of them."""

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from imagen_jax import prepare
from imagen_jax.data import memory
from imagen_jax.data.manifest import read_manifest
from imagen_jax.errors import UserError
from imagen_jax.preparing.scores import open_scores
from imagen_jax.preparing.sources import Example

COUNT = 9
OPTIONS = {"text_length": 8, "image_size": 16, "progress": False}
# Of picture 3 one score is not known, of picture 5 neither.
AESTHETIC = [i + 0.25 if i not in (3, 5) else math.nan for i in range(COUNT)]
NSFW = [1 / (i + 1) if i != 5 else math.nan for i in range(COUNT)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        Image.new("RGB", (20, 16), (i, 2 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


def _rows():
    """With a picture that is not there, and without the fifth."""
    for i in [*range(COUNT), COUNT]:
        if i != 5:
            own = {"aesthetic": [*AESTHETIC, 0.5][i], "nsfw": [*NSFW, 0.5][i]}
            known = {name: x for name, x in own.items() if not math.isnan(x)}
            yield {"file": f"{i}.png", "kind": "photo", **known}


def _write(path, rows):
    rows = list(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(n for row in rows for n in row))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def _stored(output):
    """Scores by caption, as numpy or TensorFlow Datasets reads them."""
    if output.suffix == ".npz":
        names = list(read_manifest(output).scores)
        values = np.load(output)["scores"]
        captions = memory.read_captions(str(output), len(values))
        return {c.decode(): dict(zip(names, v)) for c, v in zip(captions, values)}
    rows = tfds.builder_from_directory(output).as_dataset(split="train")
    return {r["caption"].decode(): r["scores"] for r in rows.as_numpy_iterator()}


def _expected(name, values):
    return {f"number {i}": {name: np.float32(x)} for i, x in enumerate(values)}


@pytest.mark.parametrize("name", ["out", "out.npz"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_goes_into_records(pictures, tmp_path, kind, name, capsys):
    scores = _write(tmp_path / f"s.{kind}", _rows())
    options = OPTIONS | {"progress": True, "shard_examples": 4}
    manifest = prepare.prepare(
        f"folder:{pictures}", str(tmp_path / name), scores=scores, **options
    )
    assert manifest.scores == {"aesthetic": 2, "nsfw": 1} and manifest.scored == 8
    told = capsys.readouterr().out.splitlines()
    for line in (
        f"'kind' in {scores} is no score",
        "2 of 9 have no score 'aesthetic'",
        "1 of 9 have no score 'nsfw'",
        "1 of 9 scored pictures are not here",
    ):
        assert len([own for own in told if line in own]) == 1, told
    found = _stored(tmp_path / name)
    for own, values in (("aesthetic", AESTHETIC), ("nsfw", NSFW)):
        have = {caption: {own: scores[own]} for caption, scores in found.items()}
        np.testing.assert_equal(have, _expected(own, values))


@pytest.mark.parametrize("key", ["id", "file_name", "picture"])
def test_a_picture_is_named_as_its_source_does_or_by_its_number(tmp_path, key):
    """By a column of that name, wherever it is, or by the first."""
    name = {"id": "7"}.get(key, "a/7.png")
    row = {"score": 2.5, key: name} if key != "picture" else {key: name, "score": 2.5}
    scores = open_scores(_write(tmp_path / "s.csv", [row]))
    assert scores.of(Example(7, "a/7.png", "", bytes), None) == {"score": 2.5}
    np.testing.assert_equal(
        scores.of(Example(8, "7.png", "", bytes), None), {"score": math.nan}
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.txt", "", "give a file .csv, .jsonl, .parquet"),
        ("s.csv", "file,a\nx,1\nx,2\n", "names some pictures twice"),
        ("s.csv", "file,a\nx,1,2\n", "Expected 2 columns, got 3"),
        ("s.csv", "file,a\nx,high\n", "has no column of numbers"),
        ("s.csv", "", "Empty CSV file"),
        ("s.csv", "file,a/b\nx,1\n", "'a/b'"),
        ("s.jsonl", "[]\n", "cannot be read: JSON parse error"),
        ("s.jsonl", '{"file": "x", "a": 1}\n{"a": "high"}\n', "from number to string"),
        ("s.parquet", "PAR1", "cannot be read"),
        ("gone.csv", None, "cannot be read"),
        ("gone.parquet", None, "cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_scores(str(tmp_path / name))


@pytest.mark.parametrize("value", ["", "n/a", "NaN", "inf", "-1e39"])
def test_values_that_are_no_numbers(tmp_path, value):
    rows = [{"file": "x", "a": "1"}, {"file": "y", "a": value}]
    scores = open_scores(_write(tmp_path / "s.csv", rows))
    assert math.isnan(scores.of(Example(1, "y", "", bytes), None)["a"])
    assert scores.of(Example(1, "x", "", bytes), None) == {"a": 1.0}


def test_columns_of_other_things_are_told(tmp_path):
    rows = [{"file": "x", "a": True, "b": "cat", "c": [1], "d": "1.5", "e": None}]
    scores = open_scores(_write(tmp_path / "s.jsonl", rows))
    assert scores.of(Example(1, "x", "", bytes), None) == {"a": 1.0, "d": 1.5}
    assert [fault.split("'")[1] for fault in scores.faults] == ["b", "c", "e"]


def test_names_of_another_form_are_told_before_anything_is_embedded(pictures, tmp_path):
    rows = [{"file": f"images/{i}.png", "a": 1} for i in range(COUNT)]
    scores = _write(tmp_path / "s.csv", rows)
    message = (
        r"none of the first 9 pictures: one is '\d.png' .*there is .'images/0.png'"
    )
    with pytest.raises(UserError, match=message):
        prepare.prepare(
            f"folder:{pictures}", str(tmp_path / "out"), scores=scores, **OPTIONS
        )
    assert not list((tmp_path / "out").glob("*.tfrecord"))


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_a_function_sees_what_is_stored(pictures, tmp_path, name):
    def score(picture, caption):
        assert picture.shape == (16, 20, 3) and picture.dtype == np.uint8
        return {"red": picture[0, 0, 0], "number": int(caption.split()[1])}

    source, output = f"folder:{pictures}", tmp_path / name
    manifest = prepare.prepare(source, str(output), scores=score, **OPTIONS)
    assert manifest.scores == {"red": 0, "number": 0}
    found = _stored(output)
    assert found == {f"number {i}": {"red": i, "number": i} for i in range(COUNT)}
    with pytest.raises(UserError, match="or other scores"):
        prepare.prepare(source, str(output), **OPTIONS)


def test_a_function_gives_the_same_names_to_all(pictures, tmp_path):
    def score(picture, caption):
        return {"a": 1} if picture[0, 0, 0] != 3 else {"b": 1}

    with pytest.raises(UserError, match="give all the same, NaN if there is none"):
        prepare.prepare(
            f"folder:{pictures}", str(tmp_path / "out"), scores=score, **OPTIONS
        )


def test_scores_belong_to_a_job(pictures, tmp_path):
    """Processes that share it write what one does; others' scores are refused."""
    rows, source = list(_rows()), f"folder:{pictures}"
    options = OPTIONS | {"shard_examples": 3}
    scores = _write(tmp_path / "s.csv", rows)
    one, two = tmp_path / "one", tmp_path / "two"
    prepare.prepare(source, str(one), scores=scores, **options)
    for index in (1, 0):
        prepare.prepare(
            source,
            str(two),
            scores=scores,
            process_index=index,
            process_count=2,
            **options,
        )
    files = [{f.name: f.read_bytes() for f in out.iterdir()} for out in (one, two)]
    assert files[0] == files[1]
    rows[0]["nsfw"] = 0.75
    for other in ({}, {"scores": _write(tmp_path / "other.csv", rows)}):
        with pytest.raises(UserError, match="or other scores"):
            prepare.prepare(source, str(one), **other, **options)


def test_scores_are_of_records(pictures, tmp_path):
    source, output = f"folder:{pictures}", str(tmp_path / "out")
    scores = _write(tmp_path / "s.csv", _rows())
    for own in (scores, lambda picture, caption: {}):
        with pytest.raises(UserError, match="which need an --encoder"):
            prepare.prepare(source, output, scores=own, encoder="none", **OPTIONS)
