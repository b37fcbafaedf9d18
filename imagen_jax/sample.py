"""Samples a trained cascade.

python -m imagen_jax.sample --stage=BASE_WORKDIR --stage=SR_WORKDIR \
    --prompt="a red circle" --prompt="two blue squares" --output=DIR --seed=0 \
    [--num_images=4 --guidance=1,1.35,2,4 --aug_level=0.0,0.1,0.2,0.3]

Writes one PNG per picture (and those of the stages before the last) as it is made, its
line of samples.jsonl, and grid.png. The same command goes on where it was stopped.
Several values of guidance or augmentation make every combination, and a labelled sheet
per prompt and seed. See docs/sampling.md.
"""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags

from imagen_jax import cli, images
from imagen_jax.api.cascade import all_cells, check_uses, open_stages, with_sampler
from imagen_jax.api.library import Cascade
from imagen_jax.api.samples import Job, check_output, make
from imagen_jax.errors import Stopped, UserError, printable
from imagen_jax.evaluation import prompts as prompt_files
from imagen_jax.evaluation.prompts import Prompt
from imagen_jax.preparing.images import stored_square


def read_lowres(path: str, size: int) -> np.ndarray:
    """A picture as `prepare --image_size=SIZE` cuts it: `[size, size, 3]` uint8.

    Raises `UserError` when `prepare` would not take it.
    """
    try:
        return stored_square(pathlib.Path(path).read_bytes(), size)
    except (OSError, images.Unusable) as error:
        raise UserError(f"--lowres={path} cannot be used: {error}") from None


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    define_job()
    flags.DEFINE_string("output", None, "folder for the pictures")
    flags.mark_flags_as_required(["stage", "output"])


def define_job() -> None:
    """Defines the flags that `sample` reads."""
    stage = "workdir or export of a stage, base first; or an exported cascade"
    flags.DEFINE_multi_string("stage", None, stage)
    flags.DEFINE_multi_string("prompt", [], "a caption; repeat for more pictures")
    kinds = "a file of captions: one a line, .csv, .tsv, .jsonl, or COCO's .json"
    flags.DEFINE_string("prompts", "", kinds)
    column = "of --prompts; else prompt, caption or text"
    flags.DEFINE_string("prompt_column", "", column)
    drawn = "of --prompts so many, drawn at random; 0 is all of them, in order"
    flags.DEFINE_integer("count", 0, drawn, lower_bound=0)
    flags.DEFINE_integer("prompt_seed", 0, "of the draw by --count", lower_bound=0)
    lowres = "a picture for a super-resolution stage to start from; once or per prompt"
    flags.DEFINE_multi_string("lowres", [], lowres)
    flags.DEFINE_integer("num_images", 1, "pictures of each prompt", lower_bound=1)
    packed = "also pack the pictures and captions in tar files of this many; 0: none"
    flags.DEFINE_integer("tar_images", 0, packed, lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the first picture; the next has the next seed")
    flags.DEFINE_string("encoder_weights", "", "file or folder of the text encoder")
    each = "; once for all stages or once per stage"
    sweep = each + "; values with commas between them are compared"
    guidance = "w of the paper's Eq. 2, 1 is none" + sweep
    flags.DEFINE_multi_string("guidance", [], guidance)
    noise = "noise on the low-res input, in [0, 1]" + sweep
    flags.DEFINE_multi_string("aug_level", [], noise)
    flags.DEFINE_multi_integer("batch_size", [], "pictures made at a time" + each)
    flags.DEFINE_multi_integer("steps", [], "sampling steps" + each)
    flags.DEFINE_multi_string("sampler", [], "ddpm, ddim or dpmpp" + each)
    flags.DEFINE_multi_string("threshold", [], "none, static or dynamic" + each)
    flags.DEFINE_multi_string("schedule", [], "trained, cosine or linear" + each)
    flags.DEFINE_multi_string("grid", [], "steps even in time or logsnr" + each)
    estimates = "steps, from 0, whose estimates are shown in NNNN_estimates_*.png"
    flags.DEFINE_multi_string("estimates", [], estimates)
    flags.DEFINE_bool("show_steps", False, "count the steps of a batch, for long runs")
    cli.define_distributed()


def read_prompts(
    given: Sequence[str], file: str, column: str = "", count: int = 0, seed: int = 0
) -> list[Prompt]:
    """Those of --prompt, then those of the file of --prompts.

    Raises `UserError` when there are none, or one is not UTF-8.
    """
    for prompt in given:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"--prompt={prompt!r} is not UTF-8: set the terminal to UTF-8, or give "
                "--prompts"
            ) from None
    if not (given or file):
        raise UserError('there is nothing to sample: give --prompt="..." or --prompts')
    read = prompt_files.read_prompts
    return [*map(Prompt, given), *(read(file, column, count, seed) if file else ())]


def numbers(flag: str, given: Sequence[str], kind: type) -> list[tuple]:
    """The numbers between commas in each use of a flag, or `UserError`."""
    try:
        return [tuple(kind(v) for v in one.split(",")) for one in given]
    except ValueError:
        raise UserError(
            f"--{flag}={' '.join(given)}: give numbers with commas between them"
        ) from None


def sample(output: str, steps: Mapping[str, int] | None = None) -> Job:
    """Makes the pictures that the flags ask for in the folder `output`.

    `steps` are those of the checkpoints of stages whose newest is not meant.
    """
    args = flags.FLAGS
    check_output(output)
    how = args.prompt_column, args.count, args.prompt_seed
    if any(how) and not args.prompts:
        raise UserError("--prompt_column, --count and --prompt_seed are for --prompts")
    prompts = read_prompts(args.prompt, args.prompts, *how)
    if not 0 <= args.seed <= 2**32 - len(prompts) * args.num_images:
        raise UserError(f"--seed={args.seed}: seeds lie in [0, 2**32)")
    trained = with_sampler(
        open_stages(args.stage, steps),
        batch_size=args.batch_size,
        steps=args.steps,
        sampler=args.sampler,
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
    size = trained[0].cfg.lowres_size
    if args.lowres and not size:
        raise UserError("--lowres is given, but the first stage is a base stage")
    check_uses("--lowres", args.lowres, len(prompts), "prompts")
    recorded = tuple(dict.fromkeys(sum(numbers("estimates", args.estimates, int), ())))
    fewest = min(one.cfg.sampler.steps for one in trained)
    if not set(recorded) <= set(range(fewest)):
        raise UserError(f"--estimates: a stage has {fewest} steps, from 0")
    job = Job(
        output,
        trained,
        [prompt.text for prompt in prompts],
        args.seed,
        args.num_images,
        cells,
        [(path, read_lowres(path, size)) for path in args.lowres],
        recorded,
        [prompt.known() for prompt in prompts],
        args.tar_images,
    )
    where = printable(job.folder.resolve())
    try:
        make(job, Cascade(trained, args.encoder_weights), args.show_steps)
    except KeyboardInterrupt:
        done = job.count - len(job.missing())
        raise Stopped(
            f"stopped with {done} of {job.count} pictures in {where}; the same command "
            "makes the others"
        ) from None
    if jax.process_index() == 0:
        print(f"{job.count} pictures in {where}, shown in grid.png")
    return job


def main() -> None:
    """Samples what the flags ask for."""
    cli.join()
    sample(flags.FLAGS.output)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
