"""The CLIP score: its formula, transformers' own pairs, captions told from shuffled."""

import itertools
import json

import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.evaluation.alignment import Clip, clip_score, open_clip
from tests.evaluation import networks

NEEDS = {"reason": "needs the extra `eval`"}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_score_is_of_pairs_and_shuffled_of_all_others():
    """Over several batches, against every pair one by one."""
    random = np.random.default_rng(0)
    images, texts = (unit(random.normal(size=(150, 6)) + 1) for _ in "ab")

    def run(pictures, captions):
        rows = pictures[:, 0, 0, 0]
        assert list(rows) == [int(c) for c in captions]
        return images[rows].astype(np.float32), texts[rows].astype(np.float32)

    pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(150)]
    found = clip_score(Clip({}, run), pictures, [str(i) for i in range(150)])
    cosines = images @ texts.T
    others = [cosines[i, j] for i, j in itertools.permutations(range(150), 2)]
    assert list(found) == ["CLIP score (mean cosine)", "of shuffled captions"]
    matched, shuffled = found.values()
    assert matched == pytest.approx(np.trace(cosines) / 150, rel=1e-6)
    assert shuffled == pytest.approx(np.mean(others), rel=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("transformers", **NEEDS)
    return networks.clip(tmp_path_factory.mktemp("clip") / "colours", steps=60)


def test_matched_captions_are_told_from_shuffled_ones(trained):
    """By a model that has seen other pictures of the same colours."""
    clip, names = open_clip(str(trained)), [*networks.COLOURS] * 20
    pictures = [networks.coloured(name, 1000 + i) for i, name in enumerate(names)]
    matched, shuffled = clip_score(clip, pictures, names).values()
    wrong, _ = clip_score(clip, pictures, names[1:] + names[:1]).values()
    assert matched > 0.5 > 0.3 > shuffled and wrong < shuffled + 0.1
    assert clip.about["clip"] == "colours" and len(clip.about["clip_sha256"]) == 64


def test_the_score_is_what_transformers_makes_of_each_pair(trained):
    """Alone and unpadded, by the logits; a caption that is too long is cut."""
    import torch
    import transformers
    from PIL import Image

    names = ["red", "a blue square", "x" * 40]
    pictures = [networks.coloured(name, 3) for name in ("red", "blue", "white")]
    model = transformers.CLIPModel.from_pretrained(trained)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(trained)
    cosines = []
    for name, picture in zip(names, pictures):
        resized = Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC)
        # OpenAI's numbers, as printed in CLIP's repository.
        pixels = np.asarray(resized) / 255 - (0.48145466, 0.4578275, 0.40821073)
        pixels = pixels / (0.26862954, 0.26130258, 0.27577711)
        pixels = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
        tokens = torch.tensor([tokenizer(name)["input_ids"]])
        if tokens.shape[1] > 16:
            tokens = torch.cat([tokens[:, :15], tokens[:, -1:]], 1)
        with torch.inference_mode():
            out = model(input_ids=tokens, pixel_values=pixels)
            cosines.append(float(out.logits_per_image / model.logit_scale.exp()))
    found = clip_score(open_clip(str(trained)), pictures, names)
    assert found["CLIP score (mean cosine)"] == pytest.approx(
        np.mean(cosines), abs=1e-5
    )


def test_a_folder_without_a_whole_clip_is_refused(trained, tmp_path):
    def folder(name, change):
        place = tmp_path / name
        place.mkdir()
        for file in trained.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        change(place)
        return str(place)

    def cut(place):
        file = place / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])

    def other(place):
        config = json.loads((place / "config.json").read_text())
        config["projection_dim"] = 8
        (place / "config.json").write_text(json.dumps(config))

    def deeper(place):
        config = json.loads((place / "config.json").read_text())
        config["vision_config"]["num_hidden_layers"] = 2
        (place / "config.json").write_text(json.dumps(config))

    cases = {
        "none": lambda place: (place / "model.safetensors").unlink(),
        "tokens": lambda place: [f.unlink() for f in place.glob("[vtm]*[nt]")],
        "cut": cut,
        "other": other,
        "deeper": deeper,
    }
    for name, change in cases.items():
        with pytest.raises(UserError, match="holds no CLIP") as raised:
            open_clip(folder(name, change))
        said = str(raised.value)
        assert "\n" not in said and "clip-vit-large-patch14" in said
    with pytest.raises(UserError, match="holds no CLIP"):
        open_clip(str(tmp_path / "nowhere"))
