"""Judges the cascade of a demo on more captions and seeds than the demo does.

JAX_PLATFORMS=cpu python -m benchmarks.judge --demo=demo [--captions=192] [--seeds=4]

The captions combine a colour and a shape that were never together in training.
"""

import argparse
import dataclasses

import numpy as np

from imagen_jax import load_cascade
from imagen_jax.shapes import scenes
from imagen_jax.shapes.judge import Verdict, judge


def main() -> None:
    """Prints the share that is right of what is asked, for each seed and in all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", required=True)
    parser.add_argument("--captions", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    drawn = scenes.heldout(args.captions, seed=7)
    prompts = [scenes.caption(scene) for scene in drawn] * args.seeds
    cascade = load_cascade(f"{args.demo}/base", f"{args.demo}/sr")
    made = cascade.sample(prompts)
    names = [field.name for field in dataclasses.fields(Verdict)]
    right = np.array(
        [
            dataclasses.astuple(judge(image, prompt))
            for image, prompt in zip(made.images, prompts, strict=True)
        ],
        float,  # None, where nothing is asked, becomes NaN
    ).reshape(args.seeds, args.captions, len(names))
    print(f"{'':10}" + "".join(f"{name:>10}" for name in names))
    rows = {str(seed): row for seed, row in enumerate(np.nanmean(right, 1))}
    for label, row in (rows | {"all": np.nanmean(right, (0, 1))}).items():
        print(f"{label:10}" + "".join(f"{share:10.1%}" for share in row))


if __name__ == "__main__":
    main()
