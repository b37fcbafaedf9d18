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
    """One combination of values, one for each stage."""

    label: str  # the compared values, shown under the pictures
    guidance: tuple[float | None, ...]  # None where the stage has a schedule
    aug_level: tuple[float | None, ...]  # None for a base stage


def all_cells(
    configs: Sequence[StageConfig],
    guidance: Sequence[Sequence[float]] = (),
    aug_level: Sequence[Sequence[float]] = (),
) -> list[Cell]:
    """All combinations; guidance changes fastest.

    Args:
      configs: the stages.
      guidance: values to compare: no list, one list for all stages, or one list per
        stage, to be combined in every way.
      aug_level: the same for super-resolution stages only.

    Raises:
      UserError: for another number of lists, or a level outside [0, 1].
    """
    for level in itertools.chain(*aug_level):
        if not 0 <= level <= 1:
            raise UserError(f"--aug_level={level:g}: levels lie in [0, 1]")
    weights, levels = [], []
    for cfg in configs:
        sampler = cfg.sampler
        weights.append(None if sampler.guidance_schedule else sampler.guidance)
        levels.append(sampler.aug_level if cfg.lowres_size else None)
    enlarging = [i for i, cfg in enumerate(configs) if cfg.lowres_size]
    levels = _combinations("aug_level", aug_level, levels, enlarging)
    weights = _combinations("guidance", guidance, weights, range(len(configs)))
    cells = []
    for (aug, level), (w, weight) in itertools.product(levels, weights):
        labels = [f"w {w}"] * bool(w) + [f"aug {aug}"] * bool(aug)
        cells.append(Cell(", ".join(labels), weight, level))
    return cells


def _combinations(
    name: str,
    lists: Sequence[Sequence[float]],
    own: Sequence[float | None],
    stages: Sequence[int],
) -> list[tuple[str, tuple[float | None, ...]]]:
    """A label and each stage's value, for every combination at `stages`."""
    if not lists:
        return [("", tuple(own))]
    check_uses(name, lists, len(stages), "stages that take it")
    chosen = itertools.product(*lists)
    if len(lists) == 1:
        chosen = ([value] * len(stages) for value in lists[0])
    found = []
    for values in chosen:
        of_stages = dict(enumerate(own)) | dict(zip(stages, values, strict=True))
        label = "/".join(f"{value:g}" for value in dict.fromkeys(values))
        found.append((label, tuple(of_stages.values())))
    return found


def check_uses(flag: str, given: Sequence, count: int, what: str = "stages") -> None:
    """Raises `UserError` unless a flag is given never, or once for all or for each."""
    if given and (not count or len(given) not in (1, count)):
        raise UserError(
            f"--{flag} is given {len(given)} times for {count} {what}: "
            "give it once for all of them or once for each"
        )


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
