"""The state a run starts from: its own checkpoint, named weights, or random numbers."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from imagen_jax import config as config_lib
from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.training.checkpoint import SAMPLED, Checkpointer
from imagen_jax.training.state import TrainState, abstract_state, create_state
from imagen_jax.training.weights import Exported, is_exported


class Workdir:
    """The averaged parameters in the newest undamaged checkpoint of a workdir.

    Attributes:
      path: the workdir.
      cfg: the stage.
      step: the checkpoint's step.
    """

    def __init__(self, path: str):
        """Finds the checkpoint; `UserError` when there is none that can be read."""
        self.path = path
        with contextlib.closing(Checkpointer(path)) as checkpointer:
            self.step = checkpointer.required(SAMPLED)
            self.cfg = checkpointer.stage(self.step)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its dotted name."""
        return _shapes(self.cfg)

    def load(self, like: Any) -> Any:
        """The parameters, placed like the abstract arrays of `like`."""
        with contextlib.closing(Checkpointer(self.path)) as checkpointer:
            return checkpointer.ema(like, self.step)


def open_weights(path: str) -> Workdir | Exported:
    """The averaged parameters in a workdir, or in what `export` wrote.

    Both have `path`, `cfg`, `step`, `shapes` and `load(like)`.

    Raises:
      UserError: when `path` is neither.
    """
    if "://" not in path and is_exported(path):
        return Exported(path)
    if not (epath.Path(path) / "config.json").exists():
        raise UserError(
            f"{path} is no training workdir (it has no config.json) and holds no "
            "weights of `export`; give the --workdir of a `python -m imagen_jax.train` "
            "or the --output of a `python -m imagen_jax.export`"
        )
    return Workdir(path)


def first_state(
    cfg: StageConfig,
    mesh: Mesh,
    checkpointer: Checkpointer,
    set_position: Callable[[bytes], None],
) -> tuple[TrainState, dict[str, Any]]:
    """The state that a run goes on from, and where it comes from, for the run's log.

    Args:
      cfg: the stage.
      mesh: all devices.
      checkpointer: the checkpoints of the run's workdir.
      set_position: takes the data source to where it stood at a checkpoint.

    Raises:
      UserError: when all checkpoints are damaged, or the named weights do not fit.
    """
    step = checkpointer.newest()
    if step is not None:
        state, position = checkpointer.restore(cfg, mesh, step)
        set_position(position)
        origin = {"source": "checkpoint"}
        if checkpointer.damaged:
            origin["damaged"] = {str(n): why for n, why in checkpointer.damaged.items()}
        return state, origin
    if not cfg.training.init_from:
        return create_state(cfg, mesh), {"source": "scratch"}
    weights = open_weights(cfg.training.init_from)
    check_fit(weights, cfg, "config.training.init_from")
    state = create_state(cfg, mesh)
    params = weights.load(abstract_state(cfg, mesh).ema)
    # Two copies: the step donates both.
    state = state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
    return state, {
        "source": weights.path,
        "source_step": weights.step,
        "source_differs": _differences(weights.cfg, cfg, ("diffusion.", "text.")),
    }


def check_fit(weights: Workdir | Exported, cfg: StageConfig, what: str) -> None:
    """Raises `UserError` unless `weights`, given as `what`, fit the stage `cfg`."""
    want, have = _shapes(cfg), weights.shapes
    kinds = {
        "missing there": [f"{n} {want[n]}" for n in want if n not in have],
        "only there": [f"{n} {have[n]}" for n in have if n not in want],
        "of another shape": [
            f"{n}: {have[n]} there, {want[n]} here"
            for n in want
            if n in have and have[n] != want[n]
        ],
    }
    if not any(kinds.values()):
        return
    lines = [
        f"\n  {len(names)} {kind}: {', '.join(names[:3])}{', ...' if names[3:] else ''}"
        for kind, names in kinds.items()
        if names
    ]
    different = _differences(weights.cfg, cfg, ("model.", "text.", "lowres_size"))
    hint = "give weights of this network, or change config.model to theirs"
    if different:
        changes = "".join(f"\n  config.{line}" for line in different)
        hint = f"to have their network, change (there -> here):{changes}"
    raise UserError(
        f"{what}: the parameters of {weights.path} do not fit this stage; "
        f"{hint}\nThey differ in{''.join(lines)}"
    )


def _differences(
    old: StageConfig | None, new: StageConfig, groups: tuple[str, ...]
) -> list[str]:
    lines = config_lib.difference(old, new) if old else []
    return [line for line in lines if line.startswith(groups)]


@functools.cache
def _shapes(cfg: StageConfig) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(network.abstract_inputs(cfg)[0], sep=".")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}
