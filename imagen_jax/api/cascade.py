"""Trained cascades: opened from their workdirs, and given prompts."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tqdm
from jax.sharding import Mesh

from imagen_jax.api.sweep import Cell, all_cells, settings
from imagen_jax.config import SamplerConfig, StageConfig
from imagen_jax.diffusion.cascade import Stage, check_order, sample_cascade
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.text.encoders import embed, load_encoder
from imagen_jax.training.state import abstract_state
from imagen_jax.training.weights import Weights, open_weights


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained stage on disk.

    Attributes:
      workdir: the training's workdir, or a folder that `export` wrote.
      step: step of the checkpoint.
      cfg: the stage's config.
      weights: its averaged parameters, not loaded yet.
    """

    workdir: str
    step: int
    cfg: StageConfig
    weights: Weights

    def load(self, mesh: Mesh) -> Stage:
        """The stage with its averaged parameters on `mesh`."""
        params = self.weights.load(abstract_state(self.cfg, mesh).ema)
        return Stage(params=params, cfg=self.cfg, apply=network.apply)


def open_stages(workdirs: Sequence[str]) -> list[Trained]:
    """Opens the newest complete checkpoint of each workdir, or an exported folder.

    Raises:
      UserError: for any other folder, or stages trained on different text encoders.
    """
    trained = []
    for workdir in workdirs:
        weights = open_weights(workdir)
        if weights.cfg is None:
            raise UserError(
                f"--stage={workdir} is one file, which does not say what its stage is: "
                "give the folder that `export` wrote"
            )
        weights.check_fit(weights.cfg, "--stage")
        trained.append(Trained(workdir, weights.step, weights.cfg, weights))
    if len({one.cfg.text for one in trained}) > 1:
        found = "; ".join(
            f"{one.workdir}: {one.cfg.text.encoder}, {one.cfg.text.length} tokens"
            for one in trained
        )
        raise UserError(f"the stages were trained on different text ({found})")
    return trained


def with_sampler(trained: Sequence[Trained], **changes: Sequence) -> list[Trained]:
    """The stages with other sampler settings.

    Args:
      trained: the stages.
      **changes: fields of `SamplerConfig`, each a list: empty for the stages' own
        values, of one value for all stages, or of one value per stage.

    Raises:
      UserError: for another number of values, or a value out of range.
    """
    result = []
    for name, values in changes.items():
        if len(values) not in (0, 1, len(trained)):
            raise UserError(
                f"--{name} is given {len(values)} times for {len(trained)} stages: "
                "give it once for all of them or once for each"
            )
    for i, one in enumerate(trained):
        new = {name: v[i % len(v)] for name, v in changes.items() if v}
        sampler = SamplerConfig(**dataclasses.asdict(one.cfg.sampler) | new)
        cfg = dataclasses.replace(one.cfg, sampler=sampler)
        result.append(dataclasses.replace(one, cfg=cfg))
    return result


def sample_prompts(
    trained: Sequence[Trained],
    prompts: Sequence[str],
    seeds: np.ndarray,
    mesh: Mesh,
    encoder_weights: str = "",
    lowres: np.ndarray | None = None,
    cells: Sequence[Cell] = (),
    recorded_steps: Sequence[tuple[int, ...]] | None = None,
    progress: bool = True,
    show_steps: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Encodes prompts and runs them through the stages, one stage in memory at a time.

    Args:
      trained: the stages, base first.
      prompts: captions.
      seeds: one per prompt, in [0, 2**32).
      mesh: all devices.
      encoder_weights: weights of the text encoder, if it has none built in.
      lowres: `[N, h, w, 3]` uint8 when the first stage is a super-resolution stage.
      cells: combinations of values; each prompt is sampled in all of them with the same
        seed, which makes N = prompts x cells pictures. None: the stages' own values.
      recorded_steps: for each stage, the steps whose estimates are returned too.
      progress: whether to show a bar.
      show_steps: whether the bar counts the steps of a batch too.

    Returns:
      What `sample_cascade` returns, the cells of one prompt side by side.

    Raises:
      UserError: when a stage does not take what the stage before it makes.
    """
    configs = [one.cfg for one in trained]
    check_order(configs, made=0 if lowres is None else lowres.shape[1])
    cells = cells or all_cells(configs)
    text_cfg = configs[0].text
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
    text, mask, seeds = (np.repeat(a, len(cells), 0) for a in (text, mask, seeds))
    total = len(seeds) * len(trained)
    with tqdm.tqdm(
        total=total, desc="sample", unit="picture", disable=not progress
    ) as bar:
        return sample_cascade(
            (one.load(mesh) for one in trained),
            text,
            mask,
            seeds,
            mesh,
            lowres,
            [settings(c, i, cells, len(prompts)) for i, c in enumerate(configs)],
            recorded_steps,
            bar.update,
            (lambda step: bar.set_postfix(step=int(step) + 1)) if show_steps else None,
        )
