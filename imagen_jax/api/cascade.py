"""Trained cascades: opened from their workdirs, and given prompts."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
from etils import epath
from jax.sharding import Mesh

from imagen_jax.batch import pad_text
from imagen_jax.config import StageConfig, TextConfig, from_json
from imagen_jax.diffusion.cascade import Settings, Stage
from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.files import read_json
from imagen_jax.models import network
from imagen_jax.stores import check_store
from imagen_jax.text.embeddings import from_bytes, to_bytes
from imagen_jax.text.encoders import TextEncoder
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.state import abstract_state
from imagen_jax.training.weights import Weights, open_weights

# Prompts that are embedded in one call, and bytes of all that stay in memory.
_CHUNK, IN_MEMORY = 256, 2**26


def open_stages(
    workdirs: Sequence[str], steps: Mapping[str, int] | None = None
) -> list[Weights]:
    """Opens the newest complete checkpoint of each workdir, or an exported folder.

    Of a workdir in `steps` it is the newest that is not beyond that step. Raises
    `UserError` for any other folder, or stages trained on different text encoders.
    """
    trained = [open_weights(path, (steps or {}).get(path)) for path in workdirs]
    for one in trained:
        if one.cfg is None:
            raise UserError(
                f"--stage={one.path} is one file, which does not say what its stage "
                "is: give the folder that `export` wrote"
            )
        one.check_fit(one.cfg, "--stage")
    texts = {one.cfg.text: one.path for one in trained}
    if len(texts) > 1:
        found = "; ".join(
            f"{path}: {text.encoder}, {text.length} tokens"
            for text, path in texts.items()
        )
        raise UserError(f"the stages were trained on different text ({found})")
    return trained


def checkpoints(workdir: str) -> tuple[StageConfig, set[int]]:
    """The config of a training, and the steps of its complete checkpoints."""
    check_store(workdir)
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} has no config.json: give the --workdir of `train`")
    cfg = from_json(read_json(path, "the config of a run"), str(path))
    with contextlib.closing(Checkpointer(workdir)) as opened:
        return cfg, set(opened.manager.all_steps())


def load(stage: Weights, mesh: Mesh) -> Stage:
    """The stage with its averaged parameters on `mesh`."""
    params = stage.load(abstract_state(stage.cfg, mesh).ema)
    return Stage(params=params, cfg=stage.cfg, apply=network.apply)


T = TypeVar("T")
# A value for all stages, or one for each; None is a stage's own.
PerStage = T | Sequence[T | None] | None


class Sampling(TypedDict, total=False):
    """How stages are sampled."""

    guidance: PerStage[float]  # w of the paper's Eq. 2 at all steps; 1 is no guidance
    # Noise on a super-resolution stage's input, in [0, 1]; of a base it means nothing.
    aug_level: PerStage[float]
    steps: PerStage[int]
    sampler: PerStage[str]  # "ddpm", "ddim", "dpmpp" or one's own
    threshold: PerStage[str]  # "none", "static" or "dynamic"
    schedule: PerStage[str]  # "trained", "cosine" or "linear"
    grid: PerStage[str]  # steps even in "time" or "logsnr"
    batch_size: PerStage[int]  # pictures made together; a few are made one by one
    guidance_schedule: PerStage[tuple[float, ...]]  # w of each step; () for one w


def with_sampler(
    trained: Sequence[Weights], **settings: Unpack[Sampling]
) -> list[Weights]:
    """The stages with other sampler settings; an empty list is the stages' own.

    Raises `UserError` for another name or number of values, or a value out of range.
    """
    changes: list[dict[str, Any]] = [{} for _ in trained]
    for name, given in settings.items():
        if name not in Sampling.__annotations__:
            hint = did_you_mean(name, Sampling.__annotations__)
            raise UserError(f"there is no setting {name!r}{hint}")
        if isinstance(given, np.ndarray | np.generic):
            given = given.tolist()
        values = given if isinstance(given, list | tuple) else [given]
        check_uses(name, values, len(trained))
        for change, value in zip(changes, itertools.cycle(values)):
            if value is not None:
                change["name" if name == "sampler" else name] = value
                # A weight holds for all steps.
                if name == "guidance":
                    change["guidance_schedule"] = ()
    result = []
    for one, change in zip(trained, changes):
        sampler = dataclasses.replace(one.cfg.sampler, **change)
        cfg = dataclasses.replace(one.cfg, sampler=sampler)
        result.append(dataclasses.replace(one, cfg=cfg))
    return result


def check_uses(name: str, given: Sequence, count: int, what: str = "stages") -> None:
    """Raises `UserError` unless values are none, one for all or one for each."""
    if given and (not count or len(given) not in (1, count)):
        raise UserError(
            f"{name} is given {len(given)} times for {count} {what}: "
            "give it once for all of them or once for each"
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of the values that are compared."""

    label: str  # the compared values, shown under the pictures
    configs: tuple[StageConfig, ...]  # the stages with these values


def all_cells(
    configs: Sequence[StageConfig],
    guidance: Sequence[Sequence[float]] = (),
    aug_level: Sequence[Sequence[float]] = (),
) -> list[Cell]:
    """All combinations of values; guidance changes fastest.

    `guidance` has the values to compare: no list, one list for all stages, or one list
    per stage, to be combined in every way; `aug_level` the same for super-resolution
    stages only. Raises `UserError` for another number of lists, or a value out of
    range.
    """
    every = range(len(configs))
    enlarging = [i for i in every if configs[i].lowres_size]
    for i in enlarging if aug_level else ():
        if not configs[i].diffusion.lowres_augmentation:
            raise UserError(
                f"--aug_level: stage {i + 1} ({configs[i].name}) was trained without "
                "augmentation, on clean low-resolution images: leave the flag out"
            )
    levels = _choices("aug_level", aug_level, enlarging)
    weights = _choices("guidance", guidance, every)
    cells = []
    for level, weight in itertools.product(levels, weights):
        compared = {"w": weight, "aug": level}
        label = ", ".join(
            f"{name} " + "/".join(f"{v:g}" for v in dict.fromkeys(values.values()))
            for name, values in compared.items()
            if values
        )
        changed = []
        for i, cfg in enumerate(configs):
            new = {"aug_level": level[i]} if i in level else {}
            if i in weight:
                new |= {"guidance": weight[i], "guidance_schedule": ()}
            sampler = dataclasses.replace(cfg.sampler, **new)
            changed.append(dataclasses.replace(cfg, sampler=sampler))
        cells.append(Cell(label, tuple(changed)))
    return cells


def _choices(
    flag: str, lists: Sequence[Sequence[float]], stages: Sequence[int]
) -> list[dict[int, float]]:
    """Every combination of a flag's values, by the number of the stage."""
    check_uses(f"--{flag}", lists, len(stages), "stages that take it")
    if len(lists) == 1:
        return [dict.fromkeys(stages, value) for value in lists[0]]
    return [dict(zip(stages, values)) for values in itertools.product(*lists)]


def settings(configs: Sequence[StageConfig]) -> Settings:
    """The settings of one picture of each of `configs`."""
    each = [Settings.of(cfg.sampler, 1) for cfg in configs]
    return Settings(*map(np.concatenate, zip(*each)))


class Texts:
    """Embeddings of prompts, in a file where they are many: one of T5-XXL takes a MiB.

    The encoder is not kept: it may have to leave the devices before the stages come.
    """

    def __init__(self, cfg: TextConfig, folder: pathlib.Path | None = None):
        """Holds none yet; the file lies in `folder`, nameless, and ends with this."""
        self._cfg = cfg
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=folder)
        self._places: dict[str, tuple[int, int]] = {}
        self.nbytes = 0

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those that are not embedded, each once."""
        return [p for p in dict.fromkeys(prompts) if p not in self._places]

    def add(self, encoder: TextEncoder, prompts: Sequence[str]) -> None:
        """Embeds what is missing of prompts, and says which ones are cut."""
        length, new = self._cfg.length, self.missing(prompts)
        self._file.seek(self.nbytes)
        for start in range(0, len(new), _CHUNK):
            chunk = new[start : start + _CHUNK]
            for prompt, rows in zip(chunk, encoder.encode(chunk, length)):
                if (tokens := len(encoder.tokenize(prompt))) > length:
                    print(
                        f"warning: {prompt!r} has {tokens} tokens; the stages were "
                        f"trained with {length}, the rest is cut"
                    )
                data = to_bytes(rows)
                self._places[prompt] = self.nbytes, len(data)
                self.nbytes += self._file.write(data)

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`[N, L, D]` bfloat16 and the mask `[N, L]` of N of the prompts."""
        rows = []
        for start, size in map(self._places.get, prompts):
            self._file.seek(start)
            rows.append(from_bytes(self._file.read(size), self._cfg.dim))
        return pad_text(rows, self._cfg.length, self._cfg.dim)


def about(
    prompt: str, seed: int, stages: Sequence[Weights], configs: Sequence[StageConfig]
) -> dict[str, str]:
    """What the file of a picture tells of it, by the keywords of PNG.

    `stages` are those that made it, as `configs` say. "model" has the `Weights.digest`
    of each; "Source" is the word of IPTC for what is made by a trained model.
    """
    samplers = [cfg.sampler for cfg in configs]
    guidance = [one.guidance_schedule or one.guidance for one in samplers]
    return {
        "prompt": prompt,
        "seed": str(seed),
        "guidance": json.dumps(guidance),
        "model": " ".join(one.digest for one in stages),
        "Software": "generated by imagen-jax",
        "Source": "http://cv.iptc.org/newscodes/digitalsourcetype/"
        "trainedAlgorithmicMedia",
    }
