"""Several values of guidance and augmentation, compared side by side."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from imagen_jax.config import StageConfig
from imagen_jax.diffusion.cascade import Settings
from imagen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of the compared values.

    Attributes:
      label: text under its pictures.
      guidance: w for each stage; None where the stage has a schedule.
      aug_level: level for each stage; None for a base stage.
    """

    label: str
    guidance: tuple[float | None, ...]
    aug_level: tuple[float | None, ...]


def all_cells(
    configs: Sequence[StageConfig],
    guidance: Sequence[Sequence[float]] = (),
    aug_level: Sequence[Sequence[float]] = (),
) -> list[Cell]:
    """All combinations; guidance changes fastest.

    Args:
      configs: the stages.
      guidance: the values to compare: no list, one list for all stages, or one list per
        stage, to be combined in every way.
      aug_level: the same for super-resolution stages only.

    Raises:
      UserError: for another number of lists, or a level outside [0, 1].
    """
    for level in itertools.chain(*aug_level):
        if not 0 <= level <= 1:
            raise UserError(f"--aug_level={level:g}: levels lie in [0, 1]")
    super_resolution = [i for i, cfg in enumerate(configs) if cfg.lowres_size]
    levels = _combinations("aug_level", aug_level, super_resolution)
    weights = _combinations("guidance", guidance, range(len(configs)))
    cells = []
    for aug, w in itertools.product(levels, weights):
        label = ", ".join(
            f"{name} " + "/".join(f"{v:g}" for v in dict.fromkeys(values.values()))
            for name, values in (("w", w), ("aug", aug))
            if values
        )
        guided, noised = [], []
        for i, cfg in enumerate(configs):
            default = None if cfg.sampler.guidance_schedule else cfg.sampler.guidance
            guided.append(w.get(i, default))
            default = cfg.sampler.aug_level if cfg.lowres_size else None
            noised.append(aug.get(i, default))
        cells.append(Cell(label, tuple(guided), tuple(noised)))
    return cells


def parse(name: str, given: Sequence[str]) -> list[tuple[float, ...]]:
    """The numbers in each use of a flag.

    Raises:
      UserError: for text that is no number.
    """
    try:
        return [tuple(float(v) for v in one.split(",")) for one in given]
    except ValueError:
        raise UserError(
            f"--{name}={' '.join(given)}: give numbers with commas between them"
        ) from None


def _combinations(name, lists, stages) -> list[dict[int, float]]:
    """Each combination of values, by the number of the stage."""
    if not lists:
        return [{}]
    if not stages:
        raise UserError(f"--{name} is given, but no stage is a super-resolution stage")
    if len(lists) == 1:
        return [dict.fromkeys(stages, value) for value in lists[0]]
    if len(lists) != len(stages):
        raise UserError(
            f"--{name} is given {len(lists)} times for {len(stages)} stages: "
            "give it once for all of them or once for each"
        )
    return [
        dict(zip(stages, values, strict=True)) for values in itertools.product(*lists)
    ]


def settings(
    cfg: StageConfig, stage: int, cells: Sequence[Cell], prompts: int
) -> Settings:
    """Sampler settings of every picture: all cells of the first prompt, and so on."""
    one = Settings.of(cfg.sampler, len(cells))
    for i, cell in enumerate(cells):
        if cell.guidance[stage] is not None:
            one.guidance[i] = cell.guidance[stage]
        if cell.aug_level[stage] is not None:
            one.aug_level[i] = cell.aug_level[stage]
    return Settings(
        np.tile(one.guidance, (prompts, 1)), np.tile(one.aug_level, prompts)
    )
