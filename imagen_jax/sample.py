"""Samples a trained cascade.

python -m imagen_jax.sample --stage=BASE_WORKDIR --stage=SR_WORKDIR \
    --prompt="a red circle" --prompt="two blue squares" --output=DIR --seed=0 \
    [--guidance=1,1.35,2,4 --aug_level=0.0,0.1,0.2,0.3]

Writes one PNG per prompt (and those of the stages before the last), grid.png, and
samples.json, which holds all that is needed to make each picture again. Several values
of guidance or augmentation make every combination, and a labelled sheet per prompt.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from imagen_jax import cli, images
from imagen_jax.api.cascade import (
    all_cells,
    check_uses,
    open_stages,
    sample_prompts,
    with_sampler,
)
from imagen_jax.api.samples import check_output, write
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError, printable
from imagen_jax.sharding import make_mesh


def read_lowres(paths: Sequence[str], size: int, count: int) -> np.ndarray:
    """The pictures in `paths`, one per prompt or one for all, as uint8.

    Returns:
      `[count, size, size, 3]`.

    Raises:
      UserError: for another number of files, or a picture of another size.
    """
    check_uses("lowres", paths, count, "prompts")
    pictures = []
    for path in paths:
        try:
            with images.opened(pathlib.Path(path).read_bytes()) as picture:
                width, height = picture.size
                # Any size may stand in the header of a small file.
                if width == height == size:
                    pictures.append(np.asarray(picture.convert("RGB")))
        except (OSError, images.Unusable) as error:
            raise UserError(f"--lowres={path} cannot be read: {error}") from None
        if not width == height == size:
            raise UserError(
                f"--lowres={path} has {width} x {height} pixels; the stage takes "
                f"{size} x {size}: crop and resize it first"
            )
    return np.stack(pictures * (count // len(pictures)))


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_multi_string("stage", None, "workdir of a stage; in order, base first")
    flags.DEFINE_multi_string("prompt", [], "a caption; repeat for more pictures")
    flags.DEFINE_string("prompts", "", "a file with one caption a line")
    lowres = "a picture for a super-resolution stage to start from; once or per prompt"
    flags.DEFINE_multi_string("lowres", [], lowres)
    flags.DEFINE_string("output", None, "folder for the pictures")
    flags.DEFINE_integer("seed", 0, "of the first prompt; the next has the next seed")
    flags.DEFINE_string("encoder_weights", "", "file or folder of the text encoder")
    each = "; once for all stages or once per stage"
    sweep = each + "; values with commas between them are compared"
    guidance = "w of the paper's Eq. 2, 1 is none" + sweep
    flags.DEFINE_multi_string("guidance", [], guidance)
    noise = "noise on the low-res input, in [0, 1]" + sweep
    flags.DEFINE_multi_string("aug_level", [], noise)
    flags.DEFINE_multi_integer("steps", [], "sampling steps" + each)
    flags.DEFINE_multi_string("sampler", [], "ddpm, ddim or dpmpp" + each)
    flags.DEFINE_multi_string("threshold", [], "none, static or dynamic" + each)
    flags.DEFINE_multi_string("schedule", [], "trained, cosine or linear" + each)
    flags.DEFINE_multi_string("grid", [], "steps even in time or logsnr" + each)
    estimates = "steps, from 0, whose estimates are shown in estimates_*.png"
    flags.DEFINE_multi_string("estimates", [], estimates)
    flags.DEFINE_bool("show_steps", False, "count the steps of a batch, for long runs")
    flags.mark_flags_as_required(["stage", "output"])


def _prompts(given: Sequence[str], file: str) -> list[str]:
    prompts = list(given)
    if file:
        path = pathlib.Path(file)
        if not path.is_file():
            raise UserError(f"--prompts={file} is no file")
        lines = path.read_text("utf8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError('there is nothing to sample: give --prompt="..." or --prompts')
    return prompts


def numbers(flag: str, given: Sequence[str], kind: type) -> list[tuple]:
    """The numbers between commas in each use of a flag, or `UserError`."""
    try:
        return [tuple(kind(v) for v in one.split(",")) for one in given]
    except ValueError:
        raise UserError(
            f"--{flag}={' '.join(given)}: give numbers with commas between them"
        ) from None


def main() -> None:
    """Samples what the flags ask for."""
    args = flags.FLAGS
    check_output(args.output)
    prompts = _prompts(args.prompt, args.prompts)
    seeds = np.arange(args.seed, args.seed + len(prompts))
    if not 0 <= seeds[0] <= seeds[-1] < 2**32:
        raise UserError(f"--seed={args.seed}: seeds lie in [0, 2**32)")
    trained = with_sampler(
        open_stages(args.stage),
        steps=args.steps,
        name=args.sampler,
        threshold=args.threshold,
        schedule=args.schedule,
        grid=args.grid,
        # Weights of --guidance hold for all steps.
        guidance_schedule=[()] if args.guidance else [],
    )
    cells = all_cells(
        [one.cfg for one in trained],
        numbers("guidance", args.guidance, float),
        numbers("aug_level", args.aug_level, float),
    )
    lowres = None
    if args.lowres:
        size = trained[0].cfg.lowres_size
        if not size:
            raise UserError("--lowres is given, but the first stage is a base stage")
        lowres = read_lowres(args.lowres, size, len(prompts))
        lowres = np.repeat(lowres, len(cells), 0)
    recorded = sum(numbers("estimates", args.estimates, int), ())
    fewest = min(one.cfg.sampler.steps for one in trained)
    if not set(recorded) <= set(range(fewest)):
        raise UserError(f"--estimates: a stage has {fewest} steps, from 0")
    samples, estimates = sample_prompts(
        trained,
        prompts,
        seeds,
        make_mesh(MeshConfig()),
        args.encoder_weights,
        lowres,
        cells,
        recorded,
        args.show_steps,
    )
    write(args.output, trained, prompts, seeds, samples, cells, args.lowres)
    for of_stage in estimates if recorded else ():
        path = pathlib.Path(args.output) / f"estimates_{of_stage.shape[2]}px.png"
        labels = [f"step {step}" for step in recorded] * len(of_stage)
        images.save_sheet(path, np.concatenate(of_stage), len(recorded), labels)
    where = printable(args.output)
    print(f"{len(samples[-1])} pictures in {where}, all together in grid.png")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
