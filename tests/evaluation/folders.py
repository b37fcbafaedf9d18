"""Folders as `sample` leaves them, of drawn scenes, and the scenes as photographs."""

import json

import numpy as np

from imagen_jax import images
from imagen_jax.shapes import scenes

SCRIPT = "<script>alert(1)</script>"
CATEGORIES = ("One", "Two & <b>")


def write(root, count=6, side=16):
    """Two models of different noise, `secret_one` and `secret_two`, and `photos`."""
    different = {scenes.caption(scene): scene for scene in scenes.heldout(900, seed=3)}
    captions, drawn = (list(one)[:count] for one in (different, different.values()))
    captions[0] = SCRIPT
    for model, noise in (("secret_one", 10), ("secret_two", 60)):
        (root / model).mkdir(parents=True)
        lines = ""
        for i, scene in enumerate(drawn):
            rng = np.random.default_rng((i, noise))
            noisy = scenes.draw(scene, side) + rng.normal(0, noise, (side, side, 3))
            name = f"{i:04d}.png"
            images.save(root / model / name, np.clip(noisy, 0, 255).astype(np.uint8))
            line = {"file": name, "prompt": captions[i], "seed": 7_654_321 + i}
            line |= {"category": CATEGORIES[i % 2], "image": f"photo {i}.png"}
            lines += json.dumps(line) + "\n"
        (root / model / "samples.jsonl").write_text(lines)
    (root / "photos").mkdir()
    for i, scene in enumerate(drawn):
        wide = np.pad(scenes.draw(scene, 48), ((0, 0), (20, 20), (0, 0)), mode="edge")
        images.save(root / "photos" / f"photo {i}.png", wide)
    return captions
