"""From a config to batches on the devices, whatever its records are."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.batch import Batch, batch_spec
from imagen_jax.config import StageConfig
from imagen_jax.data import order
from imagen_jax.data.mixture import Source, open_sources
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

log = logging.getLogger(__name__)

# Examples are counted in 64 bits.
_MOST_BATCHES = 2**40


class Stream:
    """An endless iterator of training batches.

    Two streams of equal arguments yield equal batches, and one that is set to another's
    state yields what the other would have.
    """

    def __init__(
        self,
        batches_from: Callable[[int], Iterator[Batch]],
        mesh: Mesh,
        identity: dict[str, Any],
    ):
        """Starts at the first batch; reads nothing yet.

        Args:
          batches_from: given n, yields this host's rows of batch n and of all that
            follow, as numpy arrays.
          mesh: batches are spread over its data and fsdp axes.
          identity: what the order depends on; a state with another is refused.
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
        """The position after the last batch handed out, some 200 bytes of JSON.

        It is the same on all hosts, and valid for any number of them.
        """
        state = {"batches": self._consumed, "identity": self._identity}
        return json.dumps(state).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to the position of `get_state`.

        Raises:
          UserError: when the state is damaged, or of other records or settings.
        """
        try:
            values = json.loads(state)
            batches, identity = values["batches"], values["identity"]
            if type(batches) is not int or not 0 <= batches < _MOST_BATCHES:
                raise ValueError
            names = self._identity | identity
        except (ValueError, KeyError, TypeError):
            raise UserError(
                "the checkpoint's data position is damaged; start from an older "
                "checkpoint"
            ) from None
        for name in names:
            have, saved = self._identity.get(name), identity.get(name)
            if have != saved:
                raise UserError(
                    f"the checkpoint's data position has {name} {saved!r}, this run "
                    f"has {have!r}: continue with the same data, or start in a new "
                    "workdir"
                )
        self._seek(batches)


def open_records(
    cfg: StageConfig, mesh: Mesh, rows: np.ndarray | None = None
) -> Stream:
    """The batches of `config.data.records` on this host.

    Their order (`imagen_jax.data.order`) is a function of the config and the records.
    Of K mixed sources, the k-th has the example numbers that are k modulo K. A .npz
    file is read without TensorFlow.

    Args:
      cfg: the stage; its text is completed from the records.
      mesh: batches are spread over its data and fsdp axes.
      rows: `[n]` int64, the rows of every batch that are wanted here, ascending; by
        default those that this host's devices hold.

    Raises:
      UserError: when the records are missing, damaged, of other text than the config
        or too small, and when the batch does not divide over data.readers or the mesh.
    """
    cfg, sources = open_sources(cfg)
    size = cfg.training.batch_size
    sharding.check_batch_size(size, mesh, "training.batch_size")
    if rows is None:
        rows = sharding.rows_of_process(size, mesh, jax.process_index())
    usable = [_usable(cfg, source) for source in sources]
    contents = [source.manifest.content_sha256 for source in sources]
    examples = [sum(shards) for shards in usable]
    mixed = len(sources) > 1
    # Names and order of the entries are in checkpoints.
    identity = {
        "records": contents if mixed else contents[0],
        "examples": examples if mixed else examples[0],
        "data.seed": cfg.data.seed,
        "training.batch_size": size,
    }
    if cfg.data.flip:
        identity["data.flip"] = True
    if sources[0].is_npz:
        from imagen_jax.data import memory

        batches_from = memory.open_npz(cfg, sources[0].manifest, rows)
        return Stream(batches_from, mesh, identity)

    start_tensorflow()
    from imagen_jax.data import records

    blocks = order.count_blocks(cfg, usable)
    groups = [order.group_sizes(shards, blocks) for shards in usable]
    weights = [source.weight for source in sources]
    if mixed:
        identity["data.records' weights"] = weights
    identity["data.shuffle_examples"] = cfg.data.shuffle_examples
    identity["data.readers"] = blocks
    identity["data.square"] = cfg.data.square

    def host_reads(start):
        readers = [len(sizes) for sizes in groups]
        return order.host_reads(cfg, weights, blocks, readers, rows, start)

    read = len(next(host_reads(0)[1])[0])
    if read > 2 * len(rows):
        log.warning(
            "this host reads %.3g times as many records as it keeps, as several hosts "
            "share a reader: set config.data.readers to the number of hosts, and "
            "prepare at least as many files (a smaller --shard_examples)",
            read / len(rows),
        )
    batches_from = records.batch_reader(cfg, sources, groups, host_reads, len(rows))
    return Stream(batches_from, mesh, identity)


def _usable(cfg: StageConfig, source: Source) -> list[int]:
    """Number of images in each shard that are large enough for the stage."""
    manifest = source.manifest
    usable = manifest.large_enough(cfg.image_size)
    if not sum(usable):
        largest = max(int(side) for shard in manifest.shards for side in shard["sides"])
        raise UserError(
            f"all {manifest.examples} images in {source.path!r} are too small: "
            f"config.image_size is {cfg.image_size}, the shorter side of the largest "
            f"has {largest} pixels"
        )
    if sum(usable) < manifest.examples:
        log.warning(
            "%d of %d images in %r are smaller than config.image_size %d and are left "
            "out",
            manifest.examples - sum(usable),
            manifest.examples,
            source.path,
            cfg.image_size,
        )
    return usable


def queue_bytes(cfg: StageConfig, hosts: int = 1) -> int:
    """About how many bytes the queues of one of `hosts` hosts hold.

    data.shuffle_examples encoded records of mean size, or all if they are fewer; and
    five batches: one on the devices, two that wait, two in the making. Some hundred
    encoded records that are read ahead are not counted. Of a .npz file, which is in
    memory as a whole, it is the batch on the devices.
    """
    cfg, sources = open_sources(cfg)
    leaves = jax.tree.leaves(batch_spec(cfg))
    batch = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves) // hosts
    if sources[0].is_npz:
        return batch
    weights = sum(source.weight for source in sources)
    shuffled = 0.0
    for source in sources:
        manifest = source.manifest
        stored = manifest.image_bytes + manifest.text_bytes
        share = cfg.data.shuffle_examples * source.weight / weights
        shuffled += min(share / manifest.examples, 1) * stored
    return round(shuffled) + 5 * batch
