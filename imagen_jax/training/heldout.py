"""The loss of examples that are never trained on, always with the same noise."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagen_jax.batch import Batch, batch_spec, check_batch
from imagen_jax.compilation import compiler_options
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.loss import loss_by_logsnr, losses, noise_batch
from imagen_jax.models import network
from imagen_jax.sharding import batch_sharding, on_mesh, replicated
from imagen_jax.training.metrics import by_range
from imagen_jax.training.state import TrainState, abstract_state
from imagen_jax.training.step import deal

# Names of the losses of the parameters and of their average.
HELD_OUT = ("heldout_loss", "heldout_ema_loss")
Measure = Callable[[TrainState, Batch, int], dict[str, Any]]


def loss_sums(
    state: TrainState, batch: Batch, number: jax.Array, *, cfg: StageConfig
) -> dict[str, Any]:
    """`diffusion.loss.loss_by_logsnr` of a global batch, by `HELD_OUT`.

    All captions stay, and the noise is that of the batch's number, for every step and
    seed: losses differ by the parameters alone.
    """
    check_batch(batch, batch_spec(cfg))
    captioned = dataclasses.replace(cfg.diffusion, text_dropout=0.0)
    key = jax.random.fold_in(jax.random.key(0), number)
    noised = noise_batch(batch, key, dataclasses.replace(cfg, diffusion=captioned))
    parts = deal(noised, cfg.training.microbatches)

    def sums(params):
        denoise = functools.partial(network.apply, cfg.model, params)
        each = jax.lax.map(functools.partial(losses, denoise), parts)
        return loss_by_logsnr(each.swapaxes(0, 1).reshape(-1), noised.logsnr)

    return dict(zip(HELD_OUT, map(sums, (state.params, state.ema))))


def compile_heldout_loss(cfg: StageConfig, mesh: Mesh) -> Measure:
    """The jitted `loss_sums`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    return jax.jit(
        on_mesh(functools.partial(loss_sums, cfg=cfg), mesh),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh, cfg.model.dtype),
    )


def heldout_loss(
    measure: Measure, state: TrainState, batches: Iterable[Batch]
) -> dict[str, float]:
    """The mean losses of all examples, and those in ranges of log-SNR."""
    found = [jax.device_get(measure(state, b, i)) for i, b in enumerate(batches)]
    values = {}
    for name in HELD_OUT:
        total, count = (
            np.sum([own[name][field] for own in found], axis=0, dtype=float)
            for field in ("sum", "count")
        )
        values[name] = float(total.sum() / count.sum())
        values |= by_range(name, total, count)
    return values
