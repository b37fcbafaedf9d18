"""What a run does once its budget of skipped updates is spent."""

import collections

import jax
from jax.sharding import Mesh

from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.training.bad_updates import after_rollback
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.metrics import MetricWriter
from imagen_jax.training.replay import write_bundle
from imagen_jax.training.state import TrainState


class Recovery:
    """Leaves a bundle, then stops or rolls back.

    The devices let the state stand still when the budget is spent, so what the host
    hears of two intervals later is still there; only the batch must be read again.
    """

    def __init__(
        self,
        cfg: StageConfig,
        workdir: str,
        batches,
        mesh: Mesh,
        checkpointer: Checkpointer,
        writer: MetricWriter,
    ):
        """Takes what `loop.train` has."""
        self.cfg, self.workdir, self.batches, self.mesh = cfg, workdir, batches, mesh
        self.checkpointer, self.writer = checkpointer, writer
        self.positions = collections.deque(maxlen=2 * cfg.training.log_every_steps + 1)
        self.rolled_back_to: int | None = None

    def note(self, step: int) -> None:
        """Remembers where the data source stands before the batch of `step`."""
        self.positions.append((step, self.batches.get_state()))

    def recover(self, state: TrainState, recorded: dict[str, float]) -> TrainState:
        """A state to go on from; the data source then stands behind the bad batch.

        Args:
          state: that stands still; its arrays are freed.
          recorded: "loss" and "gradient_norm" of its last step.

        Raises:
          UserError: when the run is to stop, or can only be rolled back to where it was
            rolled back to before.
        """
        step = int(state.step)
        position = dict(self.positions)[step]
        self.batches.set_state(position)
        batch = next(self.batches)
        folder, cause = write_bundle(
            self.workdir, state, batch, position, self.cfg, self.mesh, recorded
        )
        self.checkpointer.wait()
        newest = self.checkpointer.latest_step()
        again = newest is None or newest == self.rolled_back_to
        stops = again or self.cfg.training.on_spent_budget == "stop"
        action = "stop" if stops else "rollback"
        self.writer.event("budget_spent", step, bundle=str(folder), action=action)
        if stops:
            raise UserError(self._message(step, recorded, cause, folder, newest))

        skipped_to = state.step
        # Two states need not fit.
        for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
            leaf.delete()
        good, _ = self.checkpointer.restore(self.cfg, self.mesh)
        self.rolled_back_to = newest
        self.writer.event("rollback", step, to=int(good.step))
        guard = after_rollback(good.guard, skipped_to - good.step)
        return good.replace(step=skipped_to, guard=guard)

    def _message(self, step, recorded, cause, folder, newest) -> str:
        cfg = self.cfg.training
        lines = [
            f"stopped at step {step} of {self.workdir}: the budget of "
            f"{cfg.skip_budget_steps} skipped updates (training.skip_budget_steps) is "
            f"spent. The last one had a loss of {recorded['loss']:.6g} and a gradient "
            f"norm of {recorded['gradient_norm']:.6g}; "
            + (f"first not finite was {cause}." if cause else "all numbers are finite.")
        ]
        if newest is None:
            lines.append("There is no checkpoint to go on from.")
        elif cfg.on_spent_budget == "rollback":
            lines.append(
                f"It was rolled back to step {newest} before, and has saved no other "
                "checkpoint since."
            )
        else:
            lines.append(
                "The same command does the same from the checkpoint of step "
                f"{newest}; with --config.training.on_spent_budget=rollback the run "
                "goes on from there with the data that follow."
            )
        lines.append(f"See why: python -m imagen_jax.train --replay={folder}")
        return " ".join(lines[:-1]) + "\n  " + lines[-1]
