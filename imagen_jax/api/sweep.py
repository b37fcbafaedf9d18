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
    """One combination of the values that are compared.

    Attributes:
      label: what stands under its pictures.
      guidance: w of each stage; None where it has a schedule of its own.
      aug_level: of each stage; None of a base stage.
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
      configs: of the S stages.
      guidance: the values to compare: none at all, one list for all stages, or S
        lists, of which every combination is made.
      aug_level: likewise; base stages have none and are left out of the count.

    Raises:
      UserError: for another number of lists, or a level that is not in [0, 1].
    """
    everyone = range(len(configs))
    super_resolution = [i for i in everyone if configs[i].lowres_size]
    for level in itertools.chain(*aug_level):
        if not 0 <= level <= 1:
            raise UserError(f"--aug_level={level:g}: levels lie in [0, 1]")
    made = []
    ways_of_aug = _ways("aug_level", aug_level, super_resolution)
    for aug, w in itertools.product(ways_of_aug, _ways("guidance", guidance, everyone)):
        named = [("w", w), ("aug", aug)]
        label = ", ".join(
            f"{name} " + "/".join(f"{v:g}" for v in dict.fromkeys(way.values()))
            for name, way in named
            if way
        )
        guided, noised = [], []
        for i, cfg in enumerate(configs):
            own = None if cfg.sampler.guidance_schedule else cfg.sampler.guidance
            guided.append(w.get(i, own))
            own = cfg.sampler.aug_level if cfg.lowres_size else None
            noised.append(aug.get(i, own))
        made.append(Cell(label, tuple(guided), tuple(noised)))
    return made


def parse(name: str, given: Sequence[str]) -> list[tuple[float, ...]]:
    """The lists of values of a flag: one for each time that it is given.

    Raises:
      UserError: for what is no number.
    """
    try:
        return [tuple(float(v) for v in one.split(",")) for one in given]
    except ValueError:
        raise UserError(
            f"--{name}={' '.join(given)}: give numbers with commas between them"
        ) from None


def _ways(name, lists, stages) -> list[dict[int, float]]:
    """Each combination of values, by stage."""
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
    """Of pictures of `prompts` prompts in every cell, the cells of one prompt together.

    Args:
      cfg: the stage.
      stage: its place in the cascade.
      cells: what is compared.
      prompts: how many there are.
    """
    own = Settings.of(cfg.sampler, len(cells))
    for i, cell in enumerate(cells):
        if cell.guidance[stage] is not None:
            own.guidance[i] = cell.guidance[stage]
        if cell.aug_level[stage] is not None:
            own.aug_level[i] = cell.aug_level[stage]
    return Settings(*(np.concatenate([a] * prompts) for a in dataclasses.astuple(own)))
