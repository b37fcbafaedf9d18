"""Images of the demo's cascade from embeddings stored as bfloat16 and as int8.

python -m benchmarks.embeddings --demo=demo [--what=sample|train] [--seeds=4]

"sample": the trained cascade is given held-out captions whose embeddings were stored in
either type. "train": the base is trained on records of each type, with everything else
equal, and given captions of its own type.
"""

import argparse
import pathlib

import jax
import numpy as np

from imagen_jax.api.cascade import load, open_stages
from imagen_jax.api.run import resolve, train_stage
from imagen_jax.batch import pad_text
from imagen_jax.config import MeshConfig
from imagen_jax.configs import tiny
from imagen_jax.diffusion.cascade import sample_cascade
from imagen_jax.prepare import prepare
from imagen_jax.shapes import scenes
from imagen_jax.shapes.judge import judge
from imagen_jax.sharding import make_mesh
from imagen_jax.text import embeddings
from imagen_jax.text.encoders import load_encoder


def make(workdirs, prompts, seeds, dtype):
    """Samples of every prompt with each seed, from text stored as `dtype`.

    Returns:
      `[N, H, W, 3]` int images, and `[N, 2]` bool: whether all colours and all shapes
      are right.
    """
    opened = open_stages([str(workdir) for workdir in workdirs])
    mesh = make_mesh(MeshConfig(), jax.devices())
    text_cfg = opened[0].cfg.text
    encoder = load_encoder(text_cfg.encoder)
    rows = [
        embeddings.from_bytes(embeddings.to_bytes(row, dtype), text_cfg.dim, dtype)
        for row in encoder.encode(prompts, text_cfg.length)
    ]
    text, mask = pad_text(rows * seeds, text_cfg.length, text_cfg.dim)
    stages = (load(one, mesh) for one in opened)
    samples, _ = sample_cascade(stages, text, mask, np.arange(len(text)), mesh)
    found = [judge(s, p) for s, p in zip(samples[-1], prompts * seeds, strict=True)]
    return samples[-1].astype(int), np.array([(v.colour, v.shape) for v in found])


def report(name, found, base, seeds):
    """Prints a row: shares with binomial noise, range over seeds, and gap to `base`."""
    cells = [name]
    for right, other in zip(found.T, base.T, strict=True):
        share, count = right.mean(), len(right)
        noise = np.sqrt(share * (1 - share) / count)
        by_seed = right.reshape(seeds, -1).mean(1)
        gap = right.astype(int) - other
        cells += [
            f"{share:.1%} ± {noise:.1%} ({by_seed.min():.0%}-{by_seed.max():.0%})",
            f"{gap.mean():+.1%} ± {gap.std() / np.sqrt(count):.1%}",
        ]
    print(f"| {' | '.join(cells)} |", flush=True)


def sample(folder, prompts, seeds):
    """One row per type, for the trained cascade."""
    stages = [folder / "base", folder / "sr"]
    base, right = make(stages, prompts, seeds, "bfloat16")
    report("bfloat16", right, right, seeds)
    samples, found = make(stages, prompts, seeds, "int8")
    report("int8", found, right, seeds)
    print(
        f"\n{(samples != base).any((1, 2, 3)).mean():.1%} of the images differ, "
        f"by {np.abs(samples - base).mean():.3f} of 255 on average; verdicts "
        f"differ for {(found != right).any(1).mean():.1%} of them"
    )


def train(folder, prompts, seeds):
    """One row per type, for a base trained on it."""
    base = None
    for dtype in embeddings.DTYPES:
        records = folder / f"records_{dtype}"
        prepare(
            "shapes:20000",
            str(records),
            text_length=16,
            image_size=32,
            embedding_dtype=dtype,
            progress=False,
        )
        config = tiny.base()
        config.data.records = str(records)
        config.training.update(sample_every_steps=0, checkpoint_every_steps=2900)
        workdir = folder / f"base_{dtype}"
        train_stage(resolve(config.to_dict()), str(workdir))
        _, found = make([workdir], prompts, seeds, dtype)
        base = found if base is None else base
        report(f"trained on {dtype}", found, base, seeds)


def main():
    """Prints a table per kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", required=True, help="--output of a demo")
    kinds = {"sample": sample, "train": train}
    parser.add_argument("--what", choices=kinds, action="append")
    parser.add_argument("--captions", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    heldout = scenes.heldout(args.captions, seed=2)
    prompts = [scenes.caption(scene) for scene in heldout]
    for kind in args.what or kinds:
        print(f"\n{kind}: {len(prompts)} held-out captions, {args.seeds} seeds\n")
        print("| type | colour | difference | shape | difference |")
        print("|---|---|---|---|---|")
        kinds[kind](pathlib.Path(args.demo), prompts, args.seeds)


if __name__ == "__main__":
    main()
