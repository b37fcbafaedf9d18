"""A small folder of captioned pictures, prepared both ways."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import config, prepare, sharding
from imagen_jax.data.manifest import with_text
from imagen_jax.data.mixture import read_parts

# (height, width): odd, wide, tall, square; two are smaller than 32.
SIZES = [(131, 150), (64, 64), (33, 90), (70, 35), (20, 40), (47, 47), (31, 31)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """21 pictures, every third a JPEG, with metadata.jsonl."""
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
    """A folder of five files with all of the pictures."""
    path = str(tmp_path_factory.mktemp("records") / "out")
    prepare.prepare(f"folder:{pictures}", path, shard_examples=5, progress=False)
    return path


@pytest.fixture(scope="session")
def npz(pictures, tmp_path_factory):
    """A .npz file of 32 pixel pictures, without the six that are smaller."""
    path = str(tmp_path_factory.mktemp("npz") / "out.npz")
    prepare.prepare(f"folder:{pictures}", path, image_size=32, progress=False)
    return path


@pytest.fixture(scope="session")
def stage():
    """Makes the config of a stage on records, with their text."""

    def make(records, image_size=16, batch_size=4, **fields):
        data = {"records": records, "shuffle_examples": 4, **fields.pop("data", {})}
        values = {
            "image_size": image_size,
            "data": data,
            "text": {"length": 8, "dim": 64},
            "training": {"batch_size": batch_size},
            "model": {
                "channels": (8,),
                "num_res_blocks": (1,),
                "self_attention": (False,),
                "text_attention": (False,),
            },
        }
        cfg = config.from_dict(values | fields)
        return with_text(cfg, read_parts(records)[0].manifest)

    return make


@pytest.fixture(scope="session")
def mesh():
    """One device."""
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
