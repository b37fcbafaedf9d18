"""Findings of the paper in the small, on the cascade that `make demo` trains.

python -m benchmarks.findings --demo=demo [--what=threshold|augmentation|solver]

"threshold": judged accuracy of the base at growing guidance, for each kind of
thresholding (paper Fig. A.8).
"augmentation": a second super-resolution stage is trained without noise-conditioning
augmentation; both enlarge base images with growing noise (Fig. A.11).
"solver": DDPM, DDIM and DPM-Solver++ in few steps beside DDPM in 1000.
"""

import argparse
import pathlib
import time

import numpy as np

from imagen_jax import images, load_cascade
from imagen_jax.api.run import resolve, train_stage
from imagen_jax.configs import tiny
from imagen_jax.demo import summarise
from imagen_jax.shapes import scenes
from imagen_jax.shapes.judge import judge

WEIGHTS = (3.0, 10.0, 30.0)
KINDS = ("none", "static", "dynamic")
LEVELS = (0.0, 0.1, 0.2, 0.3)
# Standard deviations of the noise on base images, of values in [0, 255].
NOISE = (0, 16, 32, 48)
SOLVERS = (
    ("ddpm", 1000, "time"),
    ("ddpm", 64, "time"),
    ("ddpm", 25, "time"),
    ("ddim", 25, "time"),
    ("dpmpp", 25, "time"),
    ("dpmpp", 25, "logsnr"),
    ("dpmpp", 12, "time"),
)


def captions(count):
    """Held-out captions."""
    return [scenes.caption(scene) for scene in scenes.heldout(count, seed=2)]


def accuracy(samples, prompts):
    """A cell with the shares of right colours and right shapes."""
    found = summarise([judge(s, p) for s, p in zip(samples, prompts, strict=True)])
    return f"{found['colour_accuracy']:.0%}, {found['shape_accuracy']:.0%}"


def save_sheet(path, samples, labels):
    """Rows of eight labelled images."""
    sheet = images.enlarge(np.concatenate(samples), 96)
    images.save(path, images.grid(sheet, 8, np.repeat(labels, 8).tolist()))


def threshold(folder, count):
    """One row per guidance weight, one column per kind, for the base alone."""
    prompts = captions(count)
    base = load_cascade(folder / "base")
    rows, shown, labels = {weight: [] for weight in WEIGHTS}, [], []
    for kind in KINDS:
        for weight in WEIGHTS:
            samples = base.sample(prompts, threshold=kind, guidance=weight).images
            rows[weight].append(accuracy(samples, prompts))
            shown.append(samples[:8])
            labels.append(f"{kind} w {weight:g}")
    print(f"| w | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for weight, row in rows.items():
        print(f"| {weight:g} | {' | '.join(row)} |")
    save_sheet(folder / "thresholds.png", shown, labels)


def train_without_augmentation(folder) -> pathlib.Path:
    """The workdir of the demo's second stage, trained on clean low-res images."""
    workdir = folder / "sr_without_augmentation"
    config = tiny.sr()
    steps = load_cascade(folder / "sr").config[0].training.steps
    config.data.records = str(folder / "records.npz")
    config.diffusion.lowres_augmentation = False
    config.sampler.aug_level = 0.0
    config.training.update(
        steps=steps, sample_every_steps=0, checkpoint_every_steps=steps
    )
    config.optimizer.decay_steps = steps
    train_stage(resolve(config.to_dict()), str(workdir))
    return workdir


def augmentation(folder, count):
    """One row per stage and level, one column per amount of noise."""
    prompts = captions(count)
    without = load_cascade(train_without_augmentation(folder))
    base, sr = (load_cascade(folder / name) for name in ("base", "sr"))
    low = base.sample(prompts).images
    normal = np.random.default_rng(0).normal(size=low.shape)
    noisy = [
        np.clip(np.round(low + scale * normal), 0, 255).astype(np.uint8)
        for scale in NOISE
    ]
    print(f"| stage | {' | '.join(map(str, NOISE))} |\n|---|{'---|' * len(NOISE)}")
    shown = [images.enlarge(each[:8], 32) for each in noisy]
    labels = [f"base: {scale}" for scale in NOISE]
    runs = [("without augmentation", without, None)]
    for level in LEVELS:
        runs.append((f"with, level {level:g}", sr, level))
    for name, stage, level in runs:
        row = []
        for scale, lowres in zip(NOISE, noisy, strict=True):
            made = stage.sample(prompts, lowres=lowres, aug_level=level)
            samples = made.images
            row.append(accuracy(samples, prompts))
            shown.append(samples[:8])
            labels.append(f"{name}: {scale}")
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    save_sheet(folder / "augmentation.png", shown, labels)


def solver(folder, count):
    """One row per sampler, used by both stages; seconds include compilation."""
    prompts = captions(count)
    print("| sampler | steps | grid | colour, shape | seconds |")
    print("|---|---|---|---|---|")
    cascade = load_cascade(folder / "base", folder / "sr")
    for name, steps, grid in SOLVERS:
        start = time.perf_counter()
        made = cascade.sample(prompts, sampler=name, steps=steps, grid=grid)
        seconds = time.perf_counter() - start
        right = accuracy(made.images, prompts)
        print(f"| {name} | {steps} | {grid} | {right} | {seconds:.0f} |", flush=True)


def main():
    """Prints a table per finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", required=True, help="--output of a demo")
    kinds = {"threshold": threshold, "augmentation": augmentation, "solver": solver}
    parser.add_argument("--what", choices=kinds, action="append")
    parser.add_argument("--captions", type=int, default=192)
    args = parser.parse_args()
    for kind in args.what or kinds:
        print(f"\n{kind}, {args.captions} held-out captions\n", flush=True)
        kinds[kind](pathlib.Path(args.demo), args.captions)


if __name__ == "__main__":
    main()
