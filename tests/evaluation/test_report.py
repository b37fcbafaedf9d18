"""A folder of samples to figures: what is read, refused, measured and told."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from imagen_jax.api import samples as sampled
from imagen_jax.api.cascade import all_cells
from imagen_jax.errors import UserError
from imagen_jax.evaluation import distances, report
from imagen_jax.evaluation.alignment import Clip
from imagen_jax.evaluation.features import Extractor
from imagen_jax.evaluation.report import Samples, evaluate, line, measure
from imagen_jax.images import save
from tests import tiny
from tests.evaluation import folders, networks

PROMPTS = ["a red circle", "two blue squares", "a red circle"]
STAGES = tiny.untrained()
SIZE = STAGES[-1].cfg.image_size
ABOUT = {"features": "means", "weights_sha256": "a1" * 32, "preset": "imagen"}


def means(pictures):
    """Features without a network: the means of colours in each quarter."""
    n, side = len(pictures), pictures.shape[1] // 2
    parts = pictures.reshape(n, 2, side, 2, side, 3).mean(axis=(2, 4))
    return parts.reshape(n, 12).astype(np.float32)


FID = Extractor("", 12, ABOUT, means)


def job(folder, prompts=PROMPTS, **changes):
    """A folder as `sample` leaves it, with drawn pictures."""
    found = sampled.Job(str(folder), STAGES, prompts, num_images=2, **changes)
    sizes = [one.cfg.image_size for one in STAGES]
    made = [networks.pictures(found.count, 32)[:, ::4, ::4], None]
    made[1] = networks.pictures(found.count, 32)[:, : sizes[1], : sizes[1]]
    with sampled._entered(found) as lines:
        for stage, pictures in enumerate(made):
            for number, picture in enumerate(pictures):
                sampled._save(found, number, stage, picture, ())
        sampled._tell(found, lines, 0)
    return folder


def edit(file, change):
    file.write_text(change(file.read_text()))


def test_samples_are_those_of_the_last_stage_with_their_captions(tmp_path):
    (found,) = report.read_samples(str(job(tmp_path / "a")))
    assert [f.name for f in found.files] == [f"{i:04d}.png" for i in range(6)]
    assert list(found.captions) == [p for p in PROMPTS for _ in "ab"]
    assert [one["checkpoint_step"] for one in found.made["stages"]] == [3, 3]
    assert found.made["guidance"] == [one.cfg.sampler.guidance for one in STAGES]


def test_values_that_were_compared_are_apart(tmp_path):
    cells = all_cells([one.cfg for one in STAGES], guidance=[(1.0, 2.0), (1.0,)])
    folder = job(tmp_path / "a", cells=cells)
    found = report.read_samples(str(folder))
    assert [one.made["guidance"] for one in found] == [[1.0, 1.0], [2.0, 1.0]]
    assert [f.name for f in found[1].files] == [f"{i:04d}.png" for i in range(1, 12, 2)]
    assert found[0].captions == found[1].captions


def test_a_folder_of_others(tmp_path):
    """PNG files alone; or with a line for each that names file and prompt."""
    for i, picture in enumerate(networks.pictures(3)):
        save(tmp_path / f"{i}.png", picture)
    (found,) = report.read_samples(str(tmp_path))
    assert [f.name for f in found.files] == ["0.png", "1.png", "2.png"]
    assert not found.captions and not found.made
    text = [json.dumps({"file": f"{i}.png", "prompt": f"é {i}"}) for i in (2, 0)]
    (tmp_path / "samples.jsonl").write_text("\n".join(text))
    (found,) = report.read_samples(str(tmp_path))
    assert [f.name for f in found.files] == ["2.png", "0.png"]
    assert found.captions == ["é 2", "é 0"]


def swapped(text):
    first, second, third, *rest = text.splitlines()
    return "\n".join([first, third, second, *rest])


def renamed(text):
    return text.replace("0001.png", "x").replace("0002.png", "0001.png")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("samples.jsonl", swapped, "line 2 is of .*0002.* asks for .*0001"),
        ("samples.jsonl", renamed, "line 2 is of .*'x'"),
        (
            "samples.jsonl",
            lambda t: t.replace("red", "green"),
            "line 1 .*another order",
        ),
        ("samples.jsonl", lambda t: t[: t.rindex("{")], "line 6 is of None.* missing"),
        ("samples.jsonl", lambda t: t + t.splitlines()[0], "line 7 .*asks for None"),
        ("samples.jsonl", lambda t: t[:-9], "is not as `sample` writes it"),
        (
            "samples.jsonl",
            lambda t: t.replace("0001.png", "../a"),
            "file and its prompt",
        ),
        ("samples.jsonl", lambda t: "", "file and its prompt"),
        ("samples.jsonl", lambda t: "{}\n" * 6, "file and its prompt"),
        ("job.json", lambda t: t[:-9], "is not what a job of `sample` was asked for"),
        ("job.json", lambda t: "{}", "is damaged"),
        (
            "job.json",
            lambda t: t.replace('"num_images": 2', '"num_images": "2"'),
            "damag",
        ),
        ("job.json", lambda t: t.replace('"ema_decay"', '"x"'), "is damaged"),
    ],
)
def test_samples_that_are_not_their_jobs_are_refused(tmp_path, file, change, message):
    folder = job(tmp_path / "a")
    edit(folder / file, change)
    with pytest.raises(UserError, match=message) as raised:
        report.read_samples(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_pictures_is_refused(tmp_path, make):
    folder = tmp_path / "a"
    if make:
        folder.mkdir()
        (folder / "notes.txt").write_text("none")
    with pytest.raises(UserError, match="holds no PNG files"):
        report.read_samples(str(folder))


def test_pictures_of_other_sizes_and_damaged_ones_are_named(tmp_path):
    (found,) = report.read_samples(str(job(tmp_path / "a")))
    save(found.files[3], networks.pictures(1, 64)[0])
    with pytest.raises(UserError, match=rf"0003.png' has 64 by 64 .*, here {SIZE}$"):
        list(report.read_pictures(found.files))
    save(found.files[0], networks.pictures(1, 32)[0, :20])
    with pytest.raises(UserError, match="0000.png' has 32 by 20 pixels"):
        list(report.read_pictures(found.files))
    data = found.files[1].read_bytes()
    found.files[1].write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="0001.png' cannot be read"):
        list(report.read_pictures(found.files[1:]))


def folder_of(place, pictures):
    place.mkdir()
    files = [place / f"{i:04d}.png" for i in range(len(pictures))]
    for file, picture in zip(files, pictures):
        save(file, picture)
    return Samples(files)


def test_figures_are_those_of_the_features(tmp_path):
    """In batches, against numpy over all of them at once."""
    left, right = networks.pictures(150, 16), networks.pictures(140, 16, 9)
    own = folder_of(tmp_path / "a", left)
    reference = dataclasses.replace(measure(right, FID, "reference"), features=None)
    result = evaluate(own, FID, reference)
    features = [means(x).astype(np.float64) for x in (left, right)]
    gaussians = [
        distances.Statistics(len(x), x.mean(0), np.cov(x, rowvar=False))
        for x in features
    ]
    assert list(result["figures"]) == ["FID"]
    want = distances.frechet(*gaussians)
    assert result["figures"]["FID"] == pytest.approx(want, rel=1e-9)
    assert (result["samples"], result["reference"]) == (150, 140)
    assert result["size"] == 16 and "note" not in result
    assert result.items() >= ABOUT.items()
    backwards = measure(left[::-1], FID, "reference")
    same = evaluate(own, FID, dataclasses.replace(backwards, features=None))
    assert abs(same["figures"]["FID"]) < 1e-9 * np.trace(gaussians[0].covariance)
    assert same["samples_sha256"] == same["reference_sha256"]
    assert same["samples_sha256"] == result["samples_sha256"]
    assert result["reference_sha256"] != result["samples_sha256"]


def test_all_figures_with_the_libraries(tmp_path):
    pytest.importorskip("torch_fidelity", reason="needs the extra `eval`")
    own = folder_of(tmp_path / "a", networks.pictures(40, 16))
    other = dataclasses.replace(FID, name="means a1a1a1a1")
    reference = measure(networks.pictures(40, 16, 9), other, "reference")
    figures = evaluate(own, other, reference)["figures"]
    names = ["FD", "KID", "KID deviation", "precision", "recall"]
    assert list(figures) == [f"{name} (means a1a1a1a1)" for name in names]


def test_few_pictures_are_told_and_fewer_refused(tmp_path):
    reference = measure(networks.pictures(30, 16), FID, "reference")
    reference = dataclasses.replace(reference, features=None)
    for count, is_told in ((12, True), (13, False)):
        own = folder_of(tmp_path / f"{count}", networks.pictures(count, 16))
        result = evaluate(own, FID, reference)
        assert ("note" in result) == is_told
        assert ("too few pictures for the covariance of 12" in line(result)) == is_told
    for count in range(4):
        with pytest.raises(UserError, match=f"reference: {count} pictures are too few"):
            measure(networks.pictures(count + 1, 16)[:count], FID, "reference")


def test_a_reference_of_others_is_unknown(tmp_path):
    own = folder_of(tmp_path / "a", networks.pictures(20, 16))
    known = measure(networks.pictures(20, 16), FID, "reference")
    stored = distances.Statistics(0, known.mean, known.covariance)
    result = evaluate(own, FID, stored)
    assert result["reference"] == result["reference_sha256"] == "unknown"
    assert "note" not in result


def reds(pictures, captions):
    """How red a picture is, and whether "red" is asked for, as unit vectors."""
    red = pictures[..., 0].mean(axis=(1, 2)) / 255
    asked = np.array(["red" in c for c in captions], float)
    return tuple(np.stack([x, 1 - x], 1) for x in (red, asked))


def test_the_clip_score_takes_the_captions_in_order(tmp_path):
    names = ["red", "blue"] * 40
    own = folder_of(
        tmp_path / "a", [networks.coloured(n, i) for i, n in enumerate(names)]
    )
    clip = Clip({"clip": "reds", "clip_sha256": "b2" * 32}, reds)
    with pytest.raises(UserError, match="no captions, which these figures need"):
        evaluate(own, clip=clip)
    result = evaluate(dataclasses.replace(own, captions=names), clip=clip)
    matched, shuffled = result["figures"].values()
    assert matched > 0.8 and shuffled < 0.55
    assert (
        result["captions_sha256"]
        == hashlib.sha256("\n".join(names).encode()).hexdigest()
    )


def test_figures_of_a_category_are_those_of_its_pictures(tmp_path):
    """A judge who finds two of three demands, or what the picture's red tells."""
    folders.write(tmp_path)
    (found,) = report.read_samples(str(tmp_path / "secret_one"))
    assert tuple(found.categories) == folders.CATEGORIES * 3
    clip = Clip({"clip": "reds", "clip_sha256": "b2" * 32}, reds)
    asked = {caption: 1 + i for i, caption in enumerate(found.captions)}

    def judge(picture, caption):
        return 10, asked[caption]

    result = evaluate(found, clip=clip, judge=judge)
    assert result["figures"]["judged right"] == pytest.approx(21 / 60)
    assert "categories" not in line(result)
    for i, name in enumerate(folders.CATEGORIES):
        files, captions = found.files[i::2], found.captions[i::2]
        alone = evaluate(report.Samples(files, captions), clip=clip, judge=judge)
        assert result["categories"][name] == alone["figures"]
        assert alone["figures"]["judged right"] == pytest.approx((9 + 3 * i) / 30)


def test_one_line_tells_all_that_decides(tmp_path):
    (found,) = report.read_samples(str(job(tmp_path / "a")))
    reference = measure(networks.pictures(20, SIZE), FID, "reference")
    clip = Clip({"clip": "reds", "clip_sha256": "b2" * 32}, reds)
    stored = dataclasses.replace(reference, features=None)
    result = evaluate(found, FID, stored, clip)
    json.dumps(result)
    said = line(result)
    assert "\n" not in said
    hashes = [value for name, value in result.items() if "sha256" in name]
    assert len(hashes) == 5  # captions, pictures, weights, reference, CLIP
    for part in (
        f"FID {result['figures']['FID']:.5g}, CLIP score (mean cosine) 0.",
        "samples 6; ",
        "reference 20; ",
        "preset imagen",
        f"{STAGES[0].cfg.name} at step 3, EMA 0.9999, ddpm of ",
        "guidance 1.0, 1.0",
        "aug_level None, 0.1",
        *(value[:8] for value in hashes),
    ):
        assert part in said, (part, said)
    config = result["stages"][0]["config"]
    assert config["model"]["channels"] == list(STAGES[0].cfg.model.channels)
