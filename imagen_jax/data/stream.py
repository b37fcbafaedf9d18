"""Batches on the devices, with a position that a checkpoint can hold."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig
from imagen_jax.data.manifest import Manifest, check_encoder
from imagen_jax.errors import UserError

log = logging.getLogger(__name__)

# Examples are counted in 64 bits.
_MOST_BATCHES = 2**40


class Stream:
    """An endless iterator of training batches.

    Two streams of equal arguments yield equal batches, and one that is set to
    another's state yields what the other would have.
    """

    def __init__(
        self,
        batches_from: Callable[[int], Iterator[Batch]],
        mesh: Mesh,
        identity: dict[str, Any],
    ):
        """
        Args:
          batches_from: given n, this host's rows of batch n and of all that follow,
            as numpy arrays.
          mesh: batches are spread over its data and fsdp axes.
          identity: what the order depends on; a state of another is refused.
        """
        self._batches_from = batches_from
        self._sharding = sharding.batch_sharding(mesh)
        self._identity = identity
        self._seek(0)

    def _seek(self, batches: int) -> None:
        self._consumed = batches
        self._host = None
        self._ahead = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """The next batch: fields as in `batch_spec`, global arrays."""
        if self._host is None:
            self._host = self._batches_from(self._consumed)
            self._ahead = self._to_devices(next(self._host))
        batch = self._ahead
        # Copied while the devices work on `batch`; not counted until it is handed out.
        self._ahead = self._to_devices(next(self._host))
        self._consumed += 1
        return batch

    def _to_devices(self, batch: Batch) -> Batch:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._sharding, x), batch
        )

    def get_state(self) -> bytes:
        """The position after the last batch handed out, some 200 bytes.

        It is the same on all hosts, and valid for any number of them.
        """
        state = {"batches": self._consumed, "identity": self._identity}
        return json.dumps(state).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to the position of `get_state`.

        Raises:
          UserError: when the state is of other records, seed or batch size.
        """
        try:
            values = json.loads(state)
            batches, identity = (values[name] for name in ("batches", "identity"))
            right = type(batches) is int and 0 <= batches < _MOST_BATCHES
            if not (right and isinstance(identity, dict)):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                "the checkpoint's data position is damaged; start from an older "
                "checkpoint"
            ) from None
        for name in self._identity | identity:
            have, saved = self._identity.get(name), identity.get(name)
            if have != saved:
                raise UserError(
                    f"the checkpoint's data position has {name} {saved!r}, this run "
                    f"has {have!r}: continue with the same data, or start in a new "
                    "workdir"
                )
        self._seek(batches)


def check_text(cfg: StageConfig, manifest: Manifest) -> None:
    """Raises `UserError` for text of another encoder; logs when captions are cut."""
    check_encoder(cfg, manifest)
    cut = manifest.longer_than(cfg.text.length)
    if cut:
        log.warning(
            "%d of %d captions have more tokens than config.text.length %d, at most "
            "%d: the rest of them is cut",
            cut,
            manifest.examples,
            cfg.text.length,
            manifest.tokens_max,
        )


def rows_here(cfg: StageConfig, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch this host's devices hold, `[n]` int64, ascending.

    Raises:
      UserError: when the batch does not divide over the mesh.
    """
    size = cfg.training.batch_size
    sharding.check_batch_size(size, mesh, "training.batch_size")
    return sharding.rows_of_process(size, mesh, jax.process_index())


def identity(
    cfg: StageConfig, content_sha256: str | list[str], examples: int | list[int]
) -> dict[str, Any]:
    """What the order of the examples depends on, under the names of the config."""
    values = {
        "records": content_sha256,
        "examples": examples,
        "data.seed": cfg.data.seed,
        "training.batch_size": cfg.training.batch_size,
    }
    # Positions that were saved before there were flips have no word of them.
    return values | {"data.flip": True} if cfg.data.flip else values
