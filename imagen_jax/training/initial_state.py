"""What a run starts from: its newest checkpoint, named weights, or random numbers."""

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

_SHOWN = 3


class Workdir:
    """The averaged parameters of a training.

    Attributes:
      path: as it was given.
      cfg: of the stage.
      step: of the checkpoint, the newest that is whole.
      shapes: of every parameter by its dotted name.
    """

    def __init__(self, path: str):
        """Opens the newest whole checkpoint of a workdir.

        Raises:
          UserError: when there is none, or it is of another version.
        """
        self.path = path
        checkpointer = Checkpointer(path)
        try:
            self.step = checkpointer.newest(SAMPLED)
            if self.step is None:
                raise UserError(
                    f"{path} has no complete checkpoint: train this stage first"
                )
            self.cfg = checkpointer.stage(self.step)
        finally:
            checkpointer.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Computes nothing."""
        return _shapes(self.cfg)

    def load(self, like):
        """The parameters, where the abstract arrays of `like` say."""
        checkpointer = Checkpointer(self.path)
        try:
            return checkpointer.ema(like, self.step)
        finally:
            checkpointer.close()


def open_weights(path: str) -> Workdir | Exported:
    """Averaged parameters: of a workdir, or as `export` writes them.

    Both have `path`, `cfg`, `step`, `shapes` and `load(like)`.

    Raises:
      UserError: when there are none at `path`.
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
    """The state that a run goes on from, and words for its log on where it is from.

    Args:
      cfg: of the stage.
      mesh: of all devices.
      checkpointer: of the run's workdir.
      set_position: of the data source.

    Raises:
      UserError: when no checkpoint is whole, or the named weights do not fit.
    """
    if checkpointer.newest() is not None:
        state, position = checkpointer.restore(cfg, mesh)
        set_position(position)
        damaged = {str(step): what for step, what in checkpointer.damaged.items()}
        origin = {"source": "checkpoint"}
        return state, origin | ({"damaged": damaged} if damaged else {})
    if not cfg.training.init_from:
        return create_state(cfg, mesh), {"source": "scratch"}
    weights = open_weights(cfg.training.init_from)
    like = abstract_state(cfg, mesh)
    check_fit(weights, cfg, "config.training.init_from")
    state = create_state(cfg, mesh)
    params = weights.load(like.ema)
    # A copy of its own: both are donated to the step.
    state = state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
    return state, {
        "source": weights.path,
        "source_step": weights.step,
        "source_differs": _differences(weights.cfg, cfg, ("diffusion.", "text.")),
    }


def check_fit(weights: Workdir | Exported, cfg: StageConfig, what: str) -> None:
    """Raises `UserError` unless `weights` are parameters of the network of `cfg`."""
    want, have = _shapes(cfg), weights.shapes
    missing = [f"{name} {want[name]}" for name in want if name not in have]
    unexpected = [f"{name} {have[name]}" for name in have if name not in want]
    other = [
        f"{name}: {have[name]} there, {want[name]} here"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if not missing + unexpected + other:
        return
    lines = [
        f"\n  {len(found)} {kind}: {', '.join(found[:_SHOWN])}"
        + (", ..." if found[_SHOWN:] else "")
        for kind, found in (
            ("missing there", missing),
            ("only there", unexpected),
            ("of another shape", other),
        )
        if found
    ]
    set_these = _differences(weights.cfg, cfg, ("model.", "text.", "lowres_size"))
    hint = "give weights of this network, or change config.model to theirs"
    if set_these:
        hint = "to have their network, change (there -> here):\n  "
        hint += "\n  ".join(f"config.{line}" for line in set_these)
    raise UserError(
        f"{what}: the parameters of {weights.path} do not fit this stage; "
        f"{hint}\nThey differ in{''.join(lines)}"
    )


def _differences(old: StageConfig | None, new: StageConfig, groups) -> list[str]:
    lines = config_lib.difference(old, new) if old else []
    return [line for line in lines if line.startswith(groups)]


@functools.cache
def _shapes(cfg: StageConfig) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(network.abstract_inputs(cfg)[0], sep=".")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}
