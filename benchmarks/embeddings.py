"""What storing embeddings as int8 does to the pictures of `make demo`.

python benchmarks/embeddings.py --demo=demo [--what=sample|train] [--seeds=4]

"sample": the trained cascade is given held-out captions whose embeddings went through
either store. "train": the base is trained again on records of each kind, alike in all
else, and given captions of its own store.
"""

import argparse
import pathlib

import jax
import numpy as np

from configs import tiny
from imagen_jax.api.cascade import open_stages
from imagen_jax.api.run import resolve, train_stage
from imagen_jax.batch import pad_text
from imagen_jax.config import MeshConfig
from imagen_jax.diffusion.cascade import sample_cascade
from imagen_jax.prepare import prepare
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes.judge import judge
from imagen_jax.sharding import make_mesh
from imagen_jax.text import embeddings
from imagen_jax.text.encoders import load_encoder


def make(workdirs, prompts, seeds, dtype):
    """Every prompt with `seeds` seeds: the pictures, and `[N, 2]` bool.

    The latter says whether all colours and all shapes are right.
    """
    trained = open_stages([str(workdir) for workdir in workdirs])
    mesh = make_mesh(MeshConfig(), jax.devices())
    text_cfg = trained[0].cfg.text
    encoder = load_encoder(text_cfg.encoder)
    rows = [
        embeddings.from_bytes(embeddings.to_bytes(row, dtype), text_cfg.dim, dtype)
        for row in encoder.encode(prompts, text_cfg.length)
    ]
    text, mask = pad_text(rows * seeds, text_cfg.length, text_cfg.dim)
    stages = (one.load(mesh) for one in trained)
    made, _ = sample_cascade(stages, text, mask, np.arange(len(text)), mesh)
    found = [judge(p, c) for p, c in zip(made[-1], prompts * seeds, strict=True)]
    return made[-1].astype(int), np.array([(v.colour, v.shape) for v in found])


def report(name, found, base, seeds):
    """A row: shares with the binomial noise, by seed, and minus those of `base`."""
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
    """One row per store."""
    stages = [folder / "base", folder / "sr"]
    base, right = make(stages, prompts, seeds, "bfloat16")
    report("bfloat16", right, right, seeds)
    made, found = make(stages, prompts, seeds, "int8")
    report("int8", found, right, seeds)
    print(
        f"\n{(made != base).any((1, 2, 3)).mean():.1%} of the pictures differ at all, "
        f"by {np.abs(made - base).mean():.3f} of 255 on average; the verdict differs "
        f"for {(found != right).any(1).mean():.1%} of them"
    )


def train(folder, prompts, seeds):
    """One row per store."""
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
    """Runs what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", required=True, help="--output of a demo")
    kinds = {"sample": sample, "train": train}
    parser.add_argument("--what", choices=kinds, action="append")
    parser.add_argument("--captions", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    scenes = shapes.heldout(args.captions, seed=2)
    prompts = [shapes.caption(scene) for scene in scenes]
    for kind in args.what or kinds:
        print(f"\n{kind}: {len(prompts)} held-out captions, {args.seeds} seeds\n")
        print("| store | colour | difference | shape | difference |")
        print("|---|---|---|---|---|")
        kinds[kind](pathlib.Path(args.demo), prompts, args.seeds)


if __name__ == "__main__":
    main()
