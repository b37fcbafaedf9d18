"""What a run does when its budget of skipped updates is spent."""

import collections
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.training.bad_updates import after_rollback
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.metrics import MetricWriter
from imagen_jax.training.replay import write_bundle
from imagen_jax.training.state import TrainState


@dataclasses.dataclass
class Recovery:
    """Leaves a bundle, then stops the run or rolls it back.

    Once the budget is spent the devices leave the state as it is, so it is still there
    when the host notices, up to two log intervals later. The batch is read again.
    """

    cfg: StageConfig
    workdir: str
    batches: Any
    mesh: Mesh
    checkpointer: Checkpointer
    writer: MetricWriter
    rolled_back_to: int | None = None

    def __post_init__(self):
        kept = 2 * self.cfg.training.log_every_steps + 1
        self.positions = collections.deque(maxlen=kept)

    def note(self, step: int) -> None:
        """Remembers where the data source stands before the batch of `step`."""
        self.positions.append((step, self.batches.get_state()))

    def recover(self, state: TrainState, recorded: dict[str, float]) -> TrainState:
        """The state to go on from; the data source then stands after the bad batch.

        Args:
          state: the state after the step that spent the budget; its arrays are freed.
          recorded: "loss" and "gradient_norm" of that step.

        Raises:
          UserError: when the run is to stop, or was rolled back to the same checkpoint
            before.
        """
        step = int(state.step)
        position = dict(self.positions)[step]
        self.batches.set_state(position)
        batch = next(self.batches)
        folder, cause = write_bundle(
            self.workdir, state, batch, position, self.cfg, self.mesh, recorded
        )
        newest, action = self.checkpointer.newest(), self.cfg.training.on_spent_budget
        if newest in (None, self.rolled_back_to):
            action = "stop"
        self.writer.event("budget_spent", step, bundle=str(folder), action=action)
        if action == "stop":
            raise UserError(self._message(step, recorded, cause, folder, newest))

        skipped_to = state.step
        # There may be no room for two states.
        for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
            leaf.delete()
        good, _ = self.checkpointer.restore(self.cfg, self.mesh, newest)
        self.rolled_back_to = newest
        self.writer.event("rollback", step, to=newest)
        guard = after_rollback(good.guard, skipped_to - good.step)
        return good.replace(step=skipped_to, guard=guard)

    def _message(self, step, recorded, cause, folder, newest) -> str:
        where = f"first not finite was {cause}" if cause else "all numbers are finite"
        going_on = (
            f"The same command repeats this from the checkpoint of step {newest}; with "
            "--config.training.on_spent_budget=rollback it goes on with the next data"
        )
        if newest is None:
            going_on = "There is no checkpoint to go on from"
        elif newest == self.rolled_back_to:
            going_on = f"No checkpoint was saved since it was rolled back to {newest}"
        return (
            f"stopped at step {step} of {self.workdir}: the budget of skipped updates, "
            f"training.skip_budget_steps={self.cfg.training.skip_budget_steps}, is "
            f"spent. The last one had a loss of {recorded['loss']:.6g} and a gradient "
            f"norm of {recorded['gradient_norm']:.6g}; {where}. {going_on}\n"
            f"  See why: python -m imagen_jax.train --replay={folder}"
        )
