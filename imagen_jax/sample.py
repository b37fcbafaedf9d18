"""Samples a trained cascade.

python -m imagen_jax.sample --stage=BASE_WORKDIR --stage=SR_WORKDIR \
    --prompt="a red circle" --prompt="two blue squares" --output=DIR --seed=0

Writes one PNG per prompt (and those of the stages before the last), grid.png, and
samples.json, which holds all that is needed to make each picture again.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh

from imagen_jax import cli, pictures
from imagen_jax.config import MeshConfig, SamplerConfig
from imagen_jax.data.text import embed, load_encoder
from imagen_jax.diffusion.cascade import Stage, check_order, sample_cascade
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.sharding import make_mesh
from imagen_jax.training.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True)
class Trained:
    """A stage and where it came from.

    Attributes:
      workdir: of its training.
      step: of the checkpoint.
      stage: averaged parameters and config.
    """

    workdir: str
    step: int
    stage: Stage


def load_stages(workdirs: Sequence[str], mesh: Mesh) -> list[Trained]:
    """The newest checkpoint of each workdir.

    Raises:
      UserError: for a folder that is no workdir, stages that do not follow each
        other, or stages trained on text of different encoders.
    """
    checkpointers = [_open(workdir) for workdir in workdirs]
    configs = [checkpointer.stage() for checkpointer in checkpointers]
    check_order(configs)
    texts = {cfg.text for cfg in configs}
    if len(texts) > 1:
        found = "; ".join(
            f"{workdir}: {cfg.text.encoder}, {cfg.text.length} tokens"
            for workdir, cfg in zip(workdirs, configs, strict=True)
        )
        raise UserError(f"the stages were trained on different text ({found})")
    trained = []
    for workdir, checkpointer, cfg in zip(
        workdirs, checkpointers, configs, strict=True
    ):
        params = checkpointer.ema(cfg, mesh)
        stage = Stage(params=params, cfg=cfg, apply=network.apply)
        trained.append(Trained(workdir, checkpointer.latest_step(), stage))
        checkpointer.close()
    return trained


def _open(workdir: str) -> Checkpointer:
    if not (pathlib.Path(workdir) / "config.json").is_file():
        raise UserError(
            f"--stage={workdir} is no training workdir (it has no config.json); give "
            "the --workdir of a `python -m imagen_jax.train`"
        )
    return Checkpointer(workdir)


def with_sampler(trained: Sequence[Trained], **changes: Sequence) -> list[Trained]:
    """The stages with other sampler settings.

    Args:
      trained: the stages.
      **changes: fields of `SamplerConfig`: a list of no value (leaves the stage's
        own), one value for all stages, or one per stage.

    Raises:
      UserError: for a number of values that is neither, or a value out of range.
    """
    samplers = [dataclasses.asdict(t.stage.cfg.sampler) for t in trained]
    for name, values in changes.items():
        if len(values) not in (0, 1, len(trained)):
            raise UserError(
                f"--{name} is given {len(values)} times for {len(trained)} stages: "
                "give it once for all of them or once for each"
            )
        for i, sampler in enumerate(samplers):
            if values:
                sampler[name] = values[i % len(values)]
    result = []
    for one, sampler in zip(trained, samplers, strict=True):
        cfg = dataclasses.replace(one.stage.cfg, sampler=SamplerConfig(**sampler))
        result.append(dataclasses.replace(one, stage=one.stage.replace(cfg=cfg)))
    return result


def sample_prompts(
    trained: Sequence[Trained],
    prompts: Sequence[str],
    seeds: np.ndarray,
    mesh: Mesh,
    encoder_weights: str = "",
    lowres: np.ndarray | None = None,
    progress: bool = True,
) -> list[np.ndarray]:
    """Encodes prompts and runs them through the stages.

    Args:
      trained: base first.
      prompts: N captions.
      seeds: `[N]` in [0, 2**32).
      mesh: of all devices.
      encoder_weights: of the text encoder, if it has none built in.
      lowres: `[N, h, w, 3]` uint8 when the first stage is a super-resolution stage.
      progress: whether to show a bar.

    Returns:
      For each stage `[N, H, W, 3]` uint8.
    """
    text_cfg = trained[0].stage.cfg.text
    encoder = load_encoder(text_cfg.encoder, encoder_weights)
    for prompt in prompts:
        tokens = len(encoder.tokenize(prompt))
        if tokens > text_cfg.length:
            print(
                f"warning: {prompt!r} has {tokens} tokens; the stages were trained "
                f"with {text_cfg.length}, the rest is cut"
            )
    text, mask = embed(encoder, list(prompts), text_cfg.length)
    # T5-XXL's weights leave the devices before the stages run.
    del encoder
    total = len(prompts) * len(trained)
    with tqdm.tqdm(
        total=total, desc="sample", unit="picture", disable=not progress
    ) as bar:
        stages = [one.stage for one in trained]
        return sample_cascade(stages, text, mask, seeds, mesh, lowres, bar.update)


def write(
    output: str,
    trained: Sequence[Trained],
    prompts: Sequence[str],
    seeds: np.ndarray,
    made: Sequence[np.ndarray],
) -> None:
    """Writes NNNN.png, NNNN_SIZEpx.png of earlier stages, grid.png, samples.json."""
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i, prompt in enumerate(prompts):
        names = [f"{i:04d}_{p.shape[1]}px.png" for p in made[:-1]] + [f"{i:04d}.png"]
        for name, stage_pictures in zip(names, made, strict=True):
            pictures.save(folder / name, stage_pictures[i])
        record = {"file": names[-1], "prompt": prompt, "seed": int(seeds[i])}
        records.append(record | {"earlier_stages": names[:-1]})
    side = made[-1].shape[1]
    shown = pictures.enlarge(made[-1], side * max(1, 96 // side))
    columns = min(8, len(prompts))
    pictures.save(folder / "grid.png", pictures.grid(shown, columns, prompts))
    description = {
        "pictures": records,
        "stages": [
            {
                "workdir": one.workdir,
                "checkpoint_step": one.step,
                "config": dataclasses.asdict(one.stage.cfg),
            }
            for one in trained
        ],
        "versions": {"jax": jax.__version__},
        "devices": [str(device) for device in jax.devices()],
    }
    (folder / "samples.json").write_text(json.dumps(description, indent=1) + "\n")


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_multi_string("stage", [], "workdir of a stage; in order, base first")
    flags.DEFINE_multi_string("prompt", [], "a caption; repeat for more pictures")
    flags.DEFINE_string("prompts", "", "a file with one caption a line")
    flags.DEFINE_string("output", None, "folder for the pictures")
    flags.DEFINE_integer("seed", 0, "of the first picture; the next has the next")
    flags.DEFINE_string("encoder_weights", "", "of the text encoder")
    each = "; once for all stages or once per stage"
    flags.DEFINE_multi_float("guidance", [], "w of the paper's Eq. 2, 1 is none" + each)
    flags.DEFINE_multi_integer("steps", [], "sampling steps" + each)
    flags.DEFINE_multi_string("sampler", [], "ddpm or ddim" + each)
    flags.DEFINE_float("aug_level", None, "noise on the low-res input, in [0, 1]")
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


def main() -> None:
    """Samples what the flags ask for."""
    args = flags.FLAGS
    prompts = _prompts(args.prompt, args.prompts)
    seeds = np.arange(args.seed, args.seed + len(prompts))
    if not 0 <= seeds[0] <= seeds[-1] < 2**32:
        raise UserError(f"--seed={args.seed}: seeds lie in [0, 2**32)")
    mesh = make_mesh(MeshConfig())
    trained = with_sampler(
        load_stages(args.stage, mesh),
        guidance=args.guidance,
        steps=args.steps,
        name=args.sampler,
        aug_level=[] if args.aug_level is None else [args.aug_level],
    )
    made = sample_prompts(trained, prompts, seeds, mesh, args.encoder_weights)
    write(args.output, trained, prompts, seeds, made)
    print(f"{len(prompts)} pictures in {args.output}, all together in grid.png")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
