"""A small folder of captioned images, prepared both ways."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import config, prepare, sharding
from imagen_jax.data.pipeline import open_sources

# (height, width): odd, wide, tall, square; two are smaller than 32.
SIZES = [(131, 150), (64, 64), (33, 90), (70, 35), (20, 40), (47, 47), (31, 31)]
OPTIONS = {"text_length": 8, "progress": False}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """21 images, every third a JPEG, with metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(21):
        h, w = SIZES[i % len(SIZES)]
        y, x = np.mgrid[:h, :w][..., None] / 20 + rng.uniform(0, 6, (2, 1, 1, 3))
        waves = 100 * np.sin(x) * np.cos(y) + 128
        pixels = (waves + rng.normal(0, 9, waves.shape)).clip(0, 255).astype(np.uint8)
        name = f"{i:02d}.{'jpg' if i % 3 == 2 else 'png'}"
        Image.fromarray(pixels).save(folder / name)
        lines.append({"file_name": name, "text": f"picture {i}, " + "so " * (i % 5)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="session")
def records(pictures, tmp_path_factory):
    """A folder of five files with all of the images."""
    path = str(tmp_path_factory.mktemp("records") / "out")
    prepare.prepare(f"folder:{pictures}", path, shard_examples=5, **OPTIONS)
    return path


@pytest.fixture(scope="session")
def npz(pictures, tmp_path_factory):
    """A .npz file of images of 32 pixels, without the six that are smaller."""
    path = str(tmp_path_factory.mktemp("npz") / "out.npz")
    prepare.prepare(f"folder:{pictures}", path, image_size=32, **OPTIONS)
    return path


@pytest.fixture(scope="session")
def even(tmp_path_factory):
    """24 scenes in eight files of three, with int8 embeddings."""
    path = str(tmp_path_factory.mktemp("even") / "out")
    options = {"image_size": 32, "shard_examples": 3, "embedding_dtype": "int8"}
    prepare.prepare("shapes:24", path, **OPTIONS, **options)
    return path


@pytest.fixture(scope="session")
def one_file(tmp_path_factory):
    """Nine scenes in one file."""
    path = str(tmp_path_factory.mktemp("one_file") / "out")
    prepare.prepare("shapes:9", path, image_size=16, **OPTIONS)
    return path


@pytest.fixture(scope="session")
def unresolved():
    """Makes the config of a stage, as a user writes it."""

    def make(records="", image_size=16, batch_size=4, data=(), **fields):
        values = {
            "image_size": image_size,
            "data": {"records": records, "shuffle_examples": 4, **dict(data)},
            "text": {"length": 0, "dim": 0},
            "training": {"batch_size": batch_size},
            "model": {
                "channels": (8,),
                "num_res_blocks": (1,),
                "self_attention": (False,),
                "text_attention": (False,),
            },
        }
        return config.from_dict(values | fields)

    return make


@pytest.fixture(scope="session")
def stage(unresolved):
    """Makes the config of a stage, with the text of its records."""

    def make(*arguments, **fields):
        return open_sources(unresolved(*arguments, **fields))[0]

    return make


@pytest.fixture(scope="session")
def mesh():
    """One device."""
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
