"""A study's folder: all that raters need, and nothing that tells which is which."""

import collections
import json
import re

import numpy as np
import pytest
from PIL import Image

from imagen_jax import images, rate
from imagen_jax.errors import UserError
from imagen_jax.evaluation import study
from imagen_jax.shapes import judge, scenes
from tests.evaluation import folders

MODELS = {"a": "secret_one", "b": "secret_two"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    folders.write(root, count=60)
    return root


def rows_of(samples, reference=True, **models):
    rows = study.read_samples(
        {k: str(samples / v) for k, v in (models or MODELS).items()}
    )
    return study.with_references(rows, str(samples / "photos")) if reference else rows


@pytest.fixture(scope="module")
def built(samples, tmp_path_factory):
    """A study of 50 rows with photographs; ten others are spare."""
    folder = tmp_path_factory.mktemp("built") / "study"
    rows = rows_of(samples)
    key = study.build(
        str(folder), rows[:50], rows[50:], rate.controls(50), seed=1234567
    )
    return folder, key


def shown(folder):
    """What the page is told."""
    text = (folder / "index.html").read_text()
    (data,) = re.findall(
        r'<script id="study" type="application/json">(.*)</script>', text
    )
    return json.loads(data)


def chunks(png):
    """The kinds of the parts of a PNG file."""
    at = 8
    while at < len(png):
        yield png[at + 4 : at + 8]
        at += 12 + int.from_bytes(png[at : at + 4])


def test_every_row_is_asked_about(built, samples):
    _, key = built
    asked = collections.Counter()
    for trial in key["trials"].values():
        if not trial["right"]:
            models = tuple(sorted(trial["pictures"].values()))
            asked[trial["question"], models, trial["category"]] += 1
    captions = {t["caption"] for t in key["trials"].values() if not t["right"]}
    assert captions == {row.caption for row in rows_of(samples)[:50]}
    want = {("quality", (m, "reference")) for m in "ab"}
    want |= {("alignment", (m,)) for m in ("a", "b", "reference")}
    assert asked == {(*w, c): 25 for w in want for c in folders.CATEGORIES}


def test_two_models_are_compared_with_each_other(samples, tmp_path):
    rows = rows_of(samples, reference=False)
    key = study.build(str(tmp_path / "s"), rows[:4], rows[4:], rate.controls(50), 0)
    pairs = [sorted(t["pictures"].values()) for t in key["trials"].values()]
    assert pairs.count(["a", "b"]) == 4 and pairs.count(["clear", "spoiled"]) == 5


def test_a_batch_has_its_share_of_controls(built):
    folder, key = built
    batches = shown(folder)["batches"]
    names = [one["trial"] for batch in batches for one in batch]
    assert sorted(names) == sorted(key["trials"])
    # 100 pairs and 150 pictures, 45 in a batch.
    assert len(batches) == 3 + 4
    for batch in batches:
        trials = [key["trials"][one["trial"]] for one in batch]
        assert len({trial["question"] for trial in trials}) == 1
        assert sum(bool(trial["right"]) for trial in trials) == 5 and len(batch) <= 50
        for one, trial in zip(batch, trials):
            assert one["pictures"] == sorted(trial["pictures"])
            assert one.get("caption", trial["caption"]) == trial["caption"]
            assert ("caption" in one) == (trial["question"] == "alignment")


def test_pictures_are_those_of_the_key(built, samples):
    """Samples as they are, of photographs the middle in the size of a sample."""
    folder, key = built
    rows = {row.caption: row for row in rows_of(samples)}
    seen = collections.Counter()
    for trial in key["trials"].values():
        for name, model in trial["pictures"].items():
            picture = images.read(folder / name)
            seen[model] += 1
            if model in MODELS:
                want = images.read(rows[trial["caption"]].files[model])
                np.testing.assert_array_equal(picture, want)
            elif model == "reference":
                photo = Image.open(rows[trial["caption"]].files[model])
                middle = photo.crop((20, 0, 68, 48)).resize((16, 16), Image.BICUBIC)
                np.testing.assert_array_equal(picture, np.asarray(middle))
    assert seen["a"] == seen["b"] == 100 and seen["reference"] == 150
    assert seen["clear"] == seen["spoiled"] == 15 and seen["drawn"] == 20


def test_controls_have_one_right_answer(built):
    """The judge of drawn pictures agrees; what is spoiled has 36 colours at most."""
    folder, key = built
    answers = collections.Counter()
    for trial in key["trials"].values():
        if trial["right"] and trial["question"] == "alignment":
            answers[trial["right"]] += 1
            (name,) = trial["pictures"]
            picture = images.read(folder / name)
            verdict = judge.judge(picture, trial["caption"])
            met = [verdict.colour, verdict.shape]
            assert met == [trial["right"] == "yes"] * 2, trial
        elif trial["right"]:
            models = {model: name for name, model in trial["pictures"].items()}
            assert trial["right"] == models["clear"]
            coarse = images.read(folder / models["spoiled"]).reshape(-1, 3)
            assert len(np.unique(coarse, axis=0)) <= 36
    assert answers == {"yes": 10, "no": 10}


def test_photographs_of_controls_are_not_rated(built):
    """Who saw one there would know it again, and that it is real."""
    folder, key = built
    rated, control = set(), set()
    for trial in key["trials"].values():
        for name, model in trial["pictures"].items():
            data = images.read(folder / name).tobytes()
            rated |= {data} if model == "reference" else set()
            control |= {data} if model == "clear" else set()
    assert len(control) == 10 and not rated & control


def test_the_folder_tells_nothing(built, samples):
    """No name, path or seed in any file, nor in what a PNG has beside its pixels."""
    folder, key = built
    names = {path.name for path in folder.iterdir()} - {"index.html"}
    assert names == {n for t in key["trials"].values() for n in t["pictures"]}
    assert all(re.fullmatch(r"[0-9a-f]{16}\.png", name) for name in names)
    for path in folder.iterdir():
        data = path.read_bytes()
        for word in (b"secret", b"photo ", b"0000.png", str(samples).encode()):
            assert word not in data, path
        assert b"1234567" not in data and b"7654321" not in data
        if path.suffix == ".png":
            assert set(chunks(data)) == {b"IHDR", b"IDAT", b"IEND"}
            assert not Image.open(path).info
            assert path.stat().st_mtime == 0
    text = (folder / "index.html").read_text()
    assert folders.SCRIPT not in text
    captions = {t.get("caption") for batch in shown(folder)["batches"] for t in batch}
    assert folders.SCRIPT in captions
    for word in ("reference", "spoiled", "drawn", 'right":'):
        assert word not in json.dumps(shown(folder))
    # Nothing is fetched from elsewhere.
    assert "http" not in text


def test_the_same_command_makes_the_same_folder(samples, tmp_path):
    rows = rows_of(samples)
    for name in "xy":
        study.build(str(tmp_path / name), rows[:4], rows[4:], rate.controls(50), 5)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "xy"
    )
    assert one == two
    study.build(str(tmp_path / "z"), rows[:4], rows[4:], rate.controls(50), 6)
    assert not set(one) & {p.name for p in (tmp_path / "z").glob("*.png")}


def test_pictures_of_a_prompt_belong_together_in_turn(tmp_path):
    for name, prompts in (("x", "pqpr"), ("y", "ppsq")):
        (tmp_path / name).mkdir()
        lines = [{"file": f"{i}.png", "prompt": p} for i, p in enumerate(prompts)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "samples.jsonl").write_text(text)
        for line in lines:
            (tmp_path / name / line["file"]).touch()
    rows = study.read_samples({"a": str(tmp_path / "x"), "b": str(tmp_path / "y")})
    found = [(r.caption, *(r.files[m].name for m in "ab")) for r in rows]
    assert found == [("p", "0.png", "0.png"), ("q", "1.png", "3.png")] + [
        ("p", "2.png", "1.png")
    ]


def test_references_by_a_table(samples, tmp_path):
    """Where the samples name no pictures."""
    rows = [row._replace(image="") for row in rows_of(samples, reference=False)][:3]
    for i in range(3):
        images.save(tmp_path / f"{i}.png", np.zeros((9, 9, 3), np.uint8))
    table = [{"file_name": f"{i}.png", "text": r.caption} for i, r in enumerate(rows)]
    text = "".join(json.dumps(line) + "\n" for line in table)
    (tmp_path / "metadata.jsonl").write_text(text)
    found = study.with_references(rows, str(tmp_path))
    assert [row.files["reference"].name for row in found] == ["0.png", "1.png", "2.png"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=f"has no picture for '{rows[1].caption}'"):
        study.with_references(rows, str(tmp_path))


def test_a_picture_that_is_none_leaves_no_folder(samples, tmp_path):
    rows = rows_of(samples)[:2]
    (tmp_path / "a.png").write_bytes(b"no picture")
    for model, message in (("a", "cannot be read"), ("reference", "cannot be used")):
        bad = rows[1]._replace(files=rows[1].files | {model: tmp_path / "a.png"})
        with pytest.raises(UserError, match=message):
            study.build(str(tmp_path / "s"), [rows[0], bad], [], rate.controls(50), 0)
        assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": "0.png"}\n', "line 1 names no prompt and file"),
        ('{"file": "../0.png", "prompt": "p"}\n', "line 1 names no prompt and file"),
        ('{"file": "0.png", "prompt": "p", "category": 1}\n', "line 1 names no"),
        ('{"file": "1.png", "prompt": "p"}\n', "line 1 names 1.png: it is gone"),
        ('{"file": "0.png", "prompt": "other"}\n', "no prompt has a picture in"),
        ("", "no prompt has a picture in"),
        (None, "does not exist"),
    ],
)
def test_folders_that_hold_no_samples(samples, tmp_path, text, message):
    if text is not None:
        (tmp_path / "samples.jsonl").write_text(text)
    (tmp_path / "0.png").touch()
    with pytest.raises(UserError, match=message):
        study.read_samples({"a": str(samples / "secret_one"), "b": str(tmp_path)})


def test_controls_are_all_different():
    found = rate.controls(50)
    assert len({one.picture.tobytes() for one in found}) == 50
    for one in found:
        words = [set(thing[1:]) for thing in scenes.parse(one.right).things]
        assert not set(scenes.parse(one.wrong).things[0][1:]) & set().union(*words)
