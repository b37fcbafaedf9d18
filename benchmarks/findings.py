"""Repeats findings of the paper in the small, on the cascade that `make demo` trains.

python benchmarks/findings.py --demo=demo [--what=threshold|augmentation|solver]

"threshold": judged accuracy at growing guidance for each kind of thresholding (paper
Fig. A.8). "augmentation": a second super-resolution stage is trained without
noise-conditioning augmentation; both enlarge base pictures that are spoilt more and
more (Fig. A.11). "solver": DPM-Solver++ in 25 steps beside DDPM in 1000.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

from configs import tiny
from imagen_jax import pictures
from imagen_jax.config import MeshConfig
from imagen_jax.data import shapes
from imagen_jax.data.judge import judge
from imagen_jax.demo import summarise
from imagen_jax.sharding import make_mesh
from imagen_jax.sweep import all_cells
from imagen_jax.train import resolve, train_stage
from imagen_jax.trained import open_stages, sample_prompts, with_sampler

WEIGHTS = (3.0, 10.0, 30.0)
LEVELS = (0.0, 0.1, 0.2, 0.3)
# Standard deviation of what spoils a base picture, of values in [0, 255].
SPOILT = (0, 16, 32, 48)


def captions(count):
    """Held-out captions and seeds."""
    scenes = shapes.heldout(count, seed=2)
    return [shapes.caption(scene) for scene in scenes], np.arange(count)


def accuracy(made, prompts):
    """Shares of right colours and right shapes."""
    verdicts = [judge(p, c) for p, c in zip(made, prompts, strict=True)]
    found = summarise(verdicts)
    return found["colour_accuracy"], found["shape_accuracy"]


def saturated(made) -> float:
    """The share of values within a hundredth of either end, white paper left out."""
    paper = (made > 250).all(-1, keepdims=True)
    ends = ((made < 3) | (made > 252)) & ~paper
    return ends.sum() / np.maximum((~paper).sum() * 3, 1)


def threshold(folder, mesh, count):
    """One row per weight and kind; and a picture of them."""
    prompts, seeds = captions(count)
    shown = []
    print(
        "| w | threshold | colour | shape | values at an end |\n|---|---|---|---|---|"
    )
    rows = {}
    for kind in ("none", "static", "dynamic"):
        trained = with_sampler(
            open_stages([str(folder / "base"), str(folder / "sr")]),
            threshold=[kind],
            guidance=[3.0, 1.0],
        )
        cells = all_cells([t.cfg for t in trained], [WEIGHTS, (1.0,)])
        made, _ = sample_prompts(
            trained, prompts, seeds, mesh, cells=cells, progress=False
        )
        for i, weight in enumerate(WEIGHTS):
            own = made[-1][i :: len(cells)]
            rows[weight, kind] = (*accuracy(own, prompts), saturated(own))
            shown.append(own[:8])
    for (weight, kind), (colour, shape, ends) in sorted(rows.items()):
        print(f"| {weight:g} | {kind} | {colour:.0%} | {shape:.0%} | {ends:.0%} |")
    sheet = np.concatenate(shown)
    labels = [
        f"{kind} w {weight:g}"
        for kind in ("none", "static", "dynamic")
        for weight in WEIGHTS
        for _ in range(8)
    ]
    pictures.save(
        folder / "thresholds.png", pictures.grid(pictures.enlarge(sheet, 96), 8, labels)
    )


def train_without_augmentation(folder) -> pathlib.Path:
    """The demo's super-resolution stage again, on clean low-resolution pictures."""
    workdir = folder / "sr_without_augmentation"
    config = tiny.sr()
    steps = open_stages([str(folder / "sr")])[0].cfg.training.steps
    config.data.records = str(folder / "records")
    config.diffusion.lowres_augmentation = False
    config.sampler.aug_level = 0.0
    config.training.update(
        steps=steps, sample_every_steps=0, checkpoint_every_steps=steps
    )
    config.optimizer.decay_steps = steps
    train_stage(resolve(config.to_dict()), str(workdir))
    return workdir


def augmentation(folder, mesh, count):
    """One row per stage and level, one column per degree of spoiling."""
    prompts, seeds = captions(count)
    without = train_without_augmentation(folder)
    base, sr = (open_stages([str(folder / n)]) for n in ("base", "sr"))
    (low,), _ = sample_prompts(base, prompts, seeds, mesh, progress=False)
    noise = np.random.default_rng(0).normal(size=low.shape)
    spoilt = [
        np.clip(np.round(low + scale * noise), 0, 255).astype(np.uint8)
        for scale in SPOILT
    ]
    head = " | ".join(f"{scale} of 255" for scale in SPOILT)
    print(f"| stage | {head} |\n|---|{'---|' * len(SPOILT)}")
    shown = [pictures.enlarge(s[:8], 96) for s in spoilt]
    runs = [("without augmentation", open_stages([str(without)]), ())]
    runs += [("with, level %g" % level, sr, [(level,)]) for level in LEVELS]
    for label, stage, levels in runs:
        cells = all_cells([stage[0].cfg], aug_level=levels)
        found = []
        for lowres in spoilt:
            (made,), _ = sample_prompts(
                stage, prompts, seeds, mesh, "", lowres, cells, progress=False
            )
            found.append(accuracy(made, prompts))
            shown.append(pictures.enlarge(made[:8], 96))
        row = " | ".join(f"{colour:.0%}, {shape:.0%}" for colour, shape in found)
        print(f"| {label} | {row} |")
    labels = [
        f"{label}: {scale}"
        for label in ("base", *(run[0] for run in runs))
        for scale in SPOILT
        for _ in range(8)
    ]
    sheet = pictures.grid(np.concatenate(shown), 32, labels)
    pictures.save(folder / "augmentation.png", sheet)


def solver(folder, mesh, count):
    """One row per sampler: both stages take it."""
    prompts, seeds = captions(count)
    print(
        "| sampler | steps | grid | colour | shape | seconds |\n|---|---|---|---|---|---|"
    )
    ways = [
        ("ddpm", 1000, "time"),
        ("ddpm", 64, "time"),
        ("ddpm", 25, "time"),
        ("ddim", 25, "time"),
        ("dpmpp", 25, "time"),
        ("dpmpp", 25, "logsnr"),
        ("dpmpp", 12, "time"),
    ]
    for name, steps, grid in ways:
        trained = with_sampler(
            open_stages([str(folder / "base"), str(folder / "sr")]),
            name=[name],
            steps=[steps],
            grid=[grid],
        )
        sample_prompts(trained, prompts[:1], seeds[:1], mesh, progress=False)
        start = time.perf_counter()
        made, _ = sample_prompts(trained, prompts, seeds, mesh, progress=False)
        seconds = time.perf_counter() - start
        colour, shape = accuracy(made[-1], prompts)
        print(
            f"| {name} | {steps} | {grid} | {colour:.0%} | {shape:.0%} | {seconds:.0f} |",
            flush=True,
        )


def main():
    """Runs what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", required=True, help="--output of a demo")
    kinds = {"threshold": threshold, "augmentation": augmentation, "solver": solver}
    parser.add_argument("--what", choices=kinds, action="append")
    parser.add_argument("--captions", type=int, default=192)
    args = parser.parse_args()
    mesh = make_mesh(MeshConfig(), jax.devices())
    for kind in args.what or kinds:
        print(f"\n{kind}, {args.captions} held-out captions\n", flush=True)
        kinds[kind](pathlib.Path(args.demo), mesh, args.captions)


if __name__ == "__main__":
    main()
