"""Resizes against written formulas and TensorFlow; networks against their libraries."""

import io
import math
import pickle

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.evaluation import features
from imagen_jax.images import png
from tests.evaluation import networks

SIZES = [(8, 13), (13, 8), (16, 299), (40, 17), (20, 20)]


def drawn(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def bicubic(row, size):
    """Keys' cubic of a = -1/2, stretched over the pixels that one of `size` covers."""
    scale = len(row) / size
    stretch = max(scale, 1.0)
    out = []
    for i in range(size):
        centre, weights = (i + 0.5) * scale, []
        for j in range(len(row)):
            x = abs((j + 0.5 - centre) / stretch)
            weight = 0.0
            if x < 1:
                weight = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weight = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            weights.append(weight)
        out.append(sum(w * v for w, v in zip(weights, row)) / sum(weights))
    return out


@pytest.mark.parametrize(("side", "size"), [s for s in SIZES if s[1] < 99])
def test_clean_is_a_bicubic_in_floats(side, size):
    picture = drawn(side, side)
    picture[: side // 2], picture[side // 2 :, : side // 4] = 255, 0
    found = features.resize(picture[None], size, "clean")[0]
    wide = np.stack([[bicubic(row, size) for row in plane] for plane in picture.T])
    want = np.stack([[bicubic(row, size) for row in p] for p in wide.swapaxes(1, 2)])
    np.testing.assert_allclose(found, want.clip(0, 255), atol=2e-4)
    if side != size:
        # Nothing is rounded; the bicubic's overshoot is cut.
        assert np.abs(found - found.round()).max() > 0.4
        assert want.max() > 256 and found.max() == 255 and found.min() == 0


@pytest.mark.parametrize(("side", "size"), SIZES)
def test_clean_is_pillows_for_each_channel(side, size):
    picture = drawn(side, side, 1)
    found = features.resize(picture[None], size, "clean")[0]
    for plane, channel in zip(found, picture.transpose(2, 0, 1)):
        resized = Image.fromarray(channel.astype(np.float32))
        resized = resized.resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(plane, np.asarray(resized).clip(0, 255))


def bilinear(picture, size):
    """As TensorFlow 1 does it: pixel i of the result is at i * side / size."""
    side, out = len(picture), np.empty((size, size, 3))
    for y in range(size):
        for x in range(size):
            top, left = y * side / size, x * side / size
            y0, x0 = math.floor(top), math.floor(left)
            y1, x1 = min(y0 + 1, side - 1), min(x0 + 1, side - 1)
            a, b = (
                picture[row, x0]
                + (picture[row, x1] * 1.0 - picture[row, x0]) * (left - x0)
                for row in (y0, y1)
            )
            out[y, x] = a + (b - a) * (top - y0)
    return out


@pytest.mark.parametrize(("side", "size"), SIZES)
def test_imagen_is_tensorflow_1s_bilinear(side, size):
    pytest.importorskip("torch_fidelity", reason="needs the extra `eval`")
    import tensorflow as tf

    picture = drawn(side, side, 2)
    found = features.resize(picture[None], size, "imagen")[0].transpose(1, 2, 0)
    op = tf.compat.v1.image.resize_bilinear(picture[None], (size, size)).numpy()[0]
    np.testing.assert_allclose(found, op, atol=1e-4)
    np.testing.assert_allclose(found, bilinear(picture, size), atol=3e-3)


@pytest.mark.parametrize(("height", "width"), [(9, 9), (9, 14), (20, 9)])
def test_the_middle_square(height, width):
    picture = drawn(height, width)
    top, left = (height - 9) // 2, (width - 9) // 2
    square = picture[top : top + 9, left : left + 9]
    found = features.middle_square(png(picture), 9, "imagen")
    np.testing.assert_array_equal(found, square)
    for preset, name in (("imagen", "BICUBIC"), ("clean", "LANCZOS")):
        found = features.middle_square(png(picture), 4, preset)
        want = Image.fromarray(square).resize((4, 4), Image.Resampling[name])
        np.testing.assert_array_equal(found, np.asarray(want))


def test_a_damaged_picture_of_a_reference():
    data = png(drawn(9, 9))
    for bad in (data[:60], b"", b"<svg/>"):
        with pytest.raises(UserError, match="a picture of the reference is damaged"):
            features.middle_square(bad, 9, "imagen")


def test_batches_hold_every_picture_once():
    pictures = list(np.arange(130 * 12, dtype=np.int16).reshape(130, 2, 2, 3))
    found = list(features.batches(iter(pictures)))
    assert [len(batch) for batch in found] == [64, 64, 2]
    np.testing.assert_array_equal(np.concatenate(found), pictures)
    assert list(features.batches([])) == []


def published(path, pictures, size=299):
    """Features by torch-fidelity's extractor alone, which takes bytes."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as library

    network = library.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
    )
    return network(torch.from_numpy(pictures.transpose(0, 3, 1, 2)))[0].numpy()


@pytest.mark.slow
def test_inception_is_torch_fidelitys(inception):
    pictures = networks.pictures(3, 40)
    found = features.open_extractor("inception", inception, "imagen").run(pictures)
    want = published(inception, pictures)
    assert found.shape == (3, 2048) and found.dtype == np.float32
    assert want.std(axis=0).mean() > 0.01
    np.testing.assert_array_equal(found, want)


@pytest.mark.slow
def test_inception_takes_clean_pixels_as_they_are(inception, monkeypatch):
    """What torch-fidelity's network makes of them in the place of its own resize."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as library

    pictures = networks.pictures(2, 40)
    extractor = features.open_extractor("inception", inception, "clean")
    clean = features.resize(pictures, 299, "clean")
    name = "interpolate_bilinear_2d_like_tensorflow1x"
    monkeypatch.setattr(library, name, lambda *_, **__: torch.from_numpy(clean))
    want = published(inception, pictures)
    found = extractor.run(pictures)
    np.testing.assert_array_equal(found, want)
    rounded = clean.round().astype(np.uint8).transpose(0, 2, 3, 1)
    monkeypatch.undo()
    assert 1e-6 < np.abs(published(inception, rounded) - found).max() < 0.1


def test_a_network_of_timm_sees_what_timm_prepares(small):
    import timm
    import torch

    name, path = small
    pictures = networks.pictures(4)
    network = timm.create_model(name, num_classes=0).eval()
    weights = timm.models.load_state_dict(path)
    network.load_state_dict(weights, strict=False)
    about = timm.data.resolve_model_data_config(network)
    pixels = features.resize(pictures, about["input_size"][1], "clean") / 255
    pixels -= np.array(about["mean"], np.float32)[:, None, None]
    pixels /= np.array(about["std"], np.float32)[:, None, None]
    with torch.inference_mode():
        want = network(torch.from_numpy(pixels)).numpy()
    extractor = features.open_extractor(name, path, "clean")
    np.testing.assert_allclose(extractor.run(pictures), want, rtol=1e-3, atol=1e-4)
    assert extractor.width == want.shape[1]
    assert extractor.name == f"{name} {features.sha256_of(path)[:8]}"


def test_weights_under_other_names_are_taken_in_order(small, tmp_path):
    import timm
    import torch

    name, path = small
    network = timm.create_model(name)
    network.load_state_dict(timm.models.load_state_dict(path))
    weights = network.state_dict()
    renamed = {
        f"_x{i}.{k.split('.')[-1]}": v for i, (k, v) in enumerate(weights.items())
    }
    torch.save(renamed, tmp_path / "renamed.pth")
    pictures = networks.pictures(2)
    one, other = (
        features.open_extractor(name, str(p), "clean").run(pictures)
        for p in (path, tmp_path / "renamed.pth")
    )
    np.testing.assert_array_equal(one, other)


class Code:
    """What a file that is read without care would run."""

    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


def test_other_weights_are_refused(small, tmp_path):
    import torch

    name, good = small
    other = networks.of_timm(tmp_path / "other.pth", "test_vit")
    code, short, text = (tmp_path / f"{n}.pth" for n in ("code", "short", "text"))
    torch.save({"x": torch.zeros(1), "y": Code()}, code)
    data = open(other, "rb").read()
    short.write_bytes(data[: len(data) // 2])
    text.write_text("version https://git-lfs.github.com/spec/v1")
    for path in (other, code, short, text):
        for asked in (name, "inception", "efficientnet-lite0"):
            with pytest.raises(UserError) as raised:
                features.open_extractor(asked, str(path), "imagen")
            said = str(raised.value)
            assert features.sha256_of(path) in said and f"is not of {asked}" in said
            assert "\n" not in said and len(said) < 700
    for asked, hint in (
        ("inception", "6726825d.pth"),
        ("efficientnet-lite0", "57934424.pth"),
        ("resnet18", "timm's resnet18"),
    ):
        with pytest.raises(UserError, match=f"'' is no file: give .*{hint}"):
            features.open_extractor(asked, "", "imagen")
    # The last two would be looked for elsewhere.
    for asked in ("no_such_network", "hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp"):
        with pytest.raises(
            UserError, match=f"of {asked}: .*timm knows no such network"
        ):
            features.open_extractor(asked, good, "imagen")


def test_weights_that_are_known_go_by_their_name(small, monkeypatch):
    name, path = small
    monkeypatch.setitem(features.KNOWN, name, features.sha256_of(path))
    assert features.open_extractor(name, path, "imagen").name == name


def test_known_files_are_named_by_their_hashes():
    for file, sha256 in zip(features._PLACES.values(), features.KNOWN.values()):
        assert f"-{sha256[:8]}.pth" in file


def test_pickles_are_what_the_test_takes_them_for():
    with pytest.raises(pytest.fail.Exception):
        pickle.load(io.BytesIO(pickle.dumps(Code())))
