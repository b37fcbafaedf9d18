"""Repeats findings of the paper in the small, on the cascade that `make demo` trains.

python benchmarks/findings.py --demo=demo [--what=threshold|augmentation|solver]

"threshold": judged accuracy of the base at growing guidance for each kind of
thresholding (paper Fig. A.8), trained again on pictures of muted hues (hues.py). The
finding would be repeated if at w = 10 and more dynamic thresholding had more pictures
than static and none whose two hues are right, and more whose hues are as strong as
drawn, each by more than two standard errors. exact_guidance.py is the same without a
network.
"augmentation": a second super-resolution stage is trained without noise-conditioning
augmentation; both enlarge base pictures that are spoilt more and more (Fig. A.11).
"solver": DPM-Solver++ in 25 steps beside DDPM in 1000.
"""

import argparse
import itertools
import pathlib
import time

import hues
import jax
import numpy as np

from configs import tiny
from imagen_jax import images as pictures
from imagen_jax.api.cascade import open_stages, sample_prompts, with_sampler
from imagen_jax.api.run import resolve, train_stage
from imagen_jax.api.sweep import all_cells
from imagen_jax.config import MeshConfig
from imagen_jax.demo import summarise
from imagen_jax.prepare import prepare
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes.judge import judge
from imagen_jax.sharding import make_mesh

# Steps, and the weights at which so many are taken.
WEIGHTS = {64: (3.0, 10.0, 30.0, 100.0), 256: (10.0, 30.0)}
KINDS = ("none", "static", "dynamic")
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


def on_hues(folder) -> pathlib.Path:
    """The demo's base on another world, and predicting eps as the paper does."""
    workdir, records = folder / "base_hues", folder / "hues.npz"
    if not records.exists():
        hues.write(folder / "hues", 20_000)
        source = f"folder:{folder / 'hues'}"
        prepare(source, str(records), text_length=16, image_size=16)
    config = tiny.base()
    config.data.records = str(records)
    config.diffusion.prediction = "eps"
    config.training.update(
        steps=2500, sample_every_steps=0, checkpoint_every_steps=2500
    )
    config.optimizer.decay_steps = 2500
    train_stage(resolve(config.to_dict()), str(workdir))
    return workdir


def threshold(folder, mesh, count):
    """One row per number of steps, kind and weight of the base alone; and pictures."""
    prompts, seeds = hues.captions(count), np.arange(count)
    print("| steps | threshold | w | right | sky | sea | as drawn | at an end |")
    print("|---|---|---|---|---|---|---|---|")
    shown, labels = [], []
    trained = open_stages([str(on_hues(folder))])
    for (steps, weights), kind in itertools.product(WEIGHTS.items(), KINDS):
        cells = all_cells([trained[0].cfg], [weights])
        changed = with_sampler(trained, threshold=[kind], steps=[steps])
        (made,), _ = sample_prompts(
            changed, prompts, seeds, mesh, cells=cells, progress=False
        )
        for i, weight in enumerate(weights):
            own = made[i :: len(cells)]
            right = hues.right(own, prompts)
            at_an_end = ((own == 0) | (own == 255)).mean()
            both = right.all(1).mean(), *right.mean(0)
            shares = (*both, hues.as_drawn(own).all(1).mean(), at_an_end)
            row = " | ".join(f"{share:.0%}" for share in shares)
            print(f"| {steps} | {kind} | {weight:g} | {row} |", flush=True)
            shown.append(own[:8])
            labels += [f"{kind} w {weight:g}, {steps}"] * 8
    sheet = pictures.enlarge(np.concatenate(shown), 96)
    pictures.save(folder / "thresholds.png", pictures.grid(sheet, 16, labels))


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
    runs += [(f"with, level {level:g}", sr, [(level,)]) for level in LEVELS]
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
    """One row per sampler: both stages take it; seconds are with compilation."""
    prompts, seeds = captions(count)
    print("| sampler | steps | grid | colour | shape | seconds |")
    print("|---|---|---|---|---|---|")
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
        start = time.perf_counter()
        made, _ = sample_prompts(trained, prompts, seeds, mesh, progress=False)
        seconds = time.perf_counter() - start
        colour, shape = accuracy(made[-1], prompts)
        row = f"{name} | {steps} | {grid} | {colour:.0%} | {shape:.0%} | {seconds:.0f}"
        print(f"| {row} |", flush=True)


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
