"""The tf.data pipeline from a folder of records to the batches of a host."""

import logging
import os
from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf
from etils import epath
from jax.sharding import Mesh

from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig
from imagen_jax.data import stream, tasks
from imagen_jax.data.manifest import Manifest, read_manifest
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

log = logging.getLogger(__name__)

# Beyond it decoding is not what limits a host, and other work wants its cores.
_MAX_THREADS = 32


def make_pipeline(
    cfg: StageConfig, mesh: Mesh, process_index: int = 0, process_count: int = 1
) -> stream.Stream:
    """Batches from a folder of records.

    Every epoch each record comes once, on one host, in an order of (data.seed,
    epoch): files are shuffled, then records within data.shuffle_examples. When there
    are fewer files than hosts, every host reads all and keeps its share.

    Args:
      cfg: the stage.
      mesh: over whose data and fsdp axes a batch is spread.
      process_index: this host among `process_count`.
      process_count: hosts between which the records are divided.

    Raises:
      UserError: when the records are missing, incomplete, of another text encoder,
        or too small.
    """
    start_tensorflow()
    manifest = read_manifest(cfg.data.records)
    stream.check_text(cfg, manifest)
    usable = sum(check_sizes(cfg, manifest))
    batch_size = stream.local_batch_size(cfg, mesh, process_count)
    own = examples_of_host(cfg, manifest, process_index, process_count)
    if not own:
        raise UserError(
            f"host {process_index} of {process_count} gets none of the {usable} "
            f"pictures in {cfg.data.records!r}: prepare with a smaller "
            "--shard_examples, or use fewer hosts"
        )

    def batches_from(start: int) -> Iterator[Batch]:
        dataset = _examples_from(
            cfg, manifest, process_index, process_count, start * batch_size, own
        )
        dataset = tasks.StageFeatureConverter(cfg, manifest.embedding_dtype)(
            dataset,
            {"image": cfg.train_size, "text": cfg.text.length, "id": 1, "epoch": 1},
        )
        dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = min(
            os.cpu_count() or 1, _MAX_THREADS
        )
        for fields in dataset.with_options(options).as_numpy_iterator():
            yield Batch(**fields)

    identity = stream.identity(cfg, manifest.content_sha256, usable)
    identity["data.shuffle_examples"] = cfg.data.shuffle_examples
    identity["data.square"] = cfg.data.square
    return stream.Stream(batches_from, mesh, identity, process_count)


def check_sizes(cfg: StageConfig, manifest: Manifest) -> list[int]:
    """Of each shard the number of pictures that the stage can use.

    Raises:
      UserError: when that is none; a share that is too small is logged.
    """
    usable = manifest.large_enough(cfg.image_size)
    if not sum(usable):
        largest = max(int(side) for shard in manifest.shards for side in shard["sides"])
        raise UserError(
            f"all {manifest.examples} pictures in {cfg.data.records!r} are too small: "
            f"config.image_size is {cfg.image_size}, the shorter side of the largest "
            f"has {largest} pixels"
        )
    if sum(usable) < manifest.examples:
        log.warning(
            "%d of %d pictures in %r are smaller than config.image_size %d and are "
            "left out",
            manifest.examples - sum(usable),
            manifest.examples,
            cfg.data.records,
            cfg.image_size,
        )
    return usable


def examples_of_host(
    cfg: StageConfig, manifest: Manifest, process_index: int, process_count: int
) -> int:
    """Records that a host reads in one epoch."""
    usable = manifest.large_enough(cfg.image_size)
    if len(usable) >= process_count:
        return sum(usable[process_index::process_count])
    return len(range(process_index, sum(usable), process_count))


def _examples_from(
    cfg, manifest, process_index, process_count, start, own
) -> tf.data.Dataset:
    # A position is an epoch and a place in it, so resuming reads at most one epoch
    # of raw records and decodes none of what it skips.
    task = tasks.make_task(epath.Path(cfg.data.records), manifest, cfg.image_size)
    by_file = len(manifest.shards) >= process_count
    shard = seqio.ShardInfo(process_index, process_count) if by_file else None

    def one_epoch(epoch):
        dataset = task.get_dataset(
            shuffle_buffer_size=cfg.data.shuffle_examples,
            seed=cfg.data.seed % 2**32 * 1_000_003 + epoch,
            shard_info=shard,
            trim_output_features=False,
            try_in_mem_cache=False,
        )
        if not by_file:
            dataset = dataset.shard(process_count, process_index)
        return dataset.map(lambda row: row | {"epoch": epoch})

    epoch, place = divmod(start, own)
    epochs = tf.data.Dataset.range(epoch, np.iinfo(np.int64).max)
    return epochs.flat_map(one_epoch).skip(place)
