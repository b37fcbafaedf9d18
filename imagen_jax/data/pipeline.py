"""The tf.data pipeline from a folder of records to the batches of a host."""

import logging
import os
from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf
from jax.sharding import Mesh

from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig
from imagen_jax.data import mixture, stream, tasks
from imagen_jax.data.manifest import Manifest
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

log = logging.getLogger(__name__)

# Beyond it decoding is not what limits a host, and other work wants its cores.
_MAX_THREADS = 32


def make_pipeline(
    cfg: StageConfig, mesh: Mesh, process_index: int = 0, process_count: int = 1
) -> stream.Stream:
    """Batches from a folder of records, or from several that are mixed.

    Every epoch each record comes once, on one host, in an order of (data.seed,
    epoch): files are shuffled, then records within data.shuffle_examples. When there
    are fewer files than hosts, every host reads all and keeps its share.

    Mixed folders take turns as `mixture.enter` says, on all hosts alike. Each has its
    own epochs, and of K folders the k-th has ids that are k modulo K.

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
    parts = mixture.read_parts(cfg.data.records)
    usable, own = [], []
    for part in parts:
        stream.check_text(cfg, part.manifest)
        usable.append(sum(check_sizes(cfg, part)))
        own.append(examples_of_host(cfg, part.manifest, process_index, process_count))
        if not own[-1]:
            raise UserError(
                f"host {process_index} of {process_count} gets none of the "
                f"{usable[-1]} pictures in {part.path!r}: prepare with a smaller "
                "--shard_examples, or use fewer hosts"
            )
    batch_size = stream.local_batch_size(cfg, mesh, process_count)
    weights = [part.weight for part in parts]

    def batches_from(start: int) -> Iterator[Batch]:
        turns = (cfg.data.seed, weights, start * batch_size)
        datasets = [
            tasks.StageFeatureConverter(cfg, part.manifest.embedding_dtype)(
                _examples_from(
                    cfg, parts, k, process_index, process_count, place, own[k]
                ),
                {"image": cfg.train_size, "text": cfg.text.length, "id": 1, "epoch": 1},
            )
            for k, (part, place) in enumerate(zip(parts, mixture.enter(*turns)[0]))
        ]
        dataset = datasets[0]
        if len(parts) > 1:
            choices = tf.data.Dataset.from_generator(
                lambda: mixture.enter(*turns)[1],
                output_signature=tf.TensorSpec([None], tf.int64),
            )
            dataset = tf.data.Dataset.choose_from_datasets(datasets, choices.unbatch())
        dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = min(
            os.cpu_count() or 1, _MAX_THREADS
        )
        try:
            for fields in dataset.with_options(options).as_numpy_iterator():
                yield Batch(**fields)
        except tf.errors.InvalidArgumentError as error:
            raise UserError(
                f"{cfg.data.records!r} has a record that is not what it was prepared "
                f"to be: {error.message.splitlines()[0]}"
            ) from None
        except tf.errors.OpError as error:
            raise UserError(
                f"{cfg.data.records!r} cannot be read any more: "
                f"{error.message.splitlines()[0]}\nThe same command goes on from the "
                "last checkpoint when it can be"
            ) from None

    contents = [part.manifest.content_sha256 for part in parts]
    if len(parts) == 1:
        identity = stream.identity(cfg, contents[0], usable[0])
    else:
        identity = stream.identity(cfg, contents, usable)
        identity["data.records' weights"] = weights
    identity["data.shuffle_examples"] = cfg.data.shuffle_examples
    identity["data.square"] = cfg.data.square
    return stream.Stream(batches_from, mesh, identity, process_count)


def check_sizes(cfg: StageConfig, part: mixture.Part) -> list[int]:
    """Of each shard the number of pictures that the stage can use.

    Raises:
      UserError: when that is none; a share that is too small is logged.
    """
    manifest = part.manifest
    usable = manifest.large_enough(cfg.image_size)
    if not sum(usable):
        largest = max(int(side) for shard in manifest.shards for side in shard["sides"])
        raise UserError(
            f"all {manifest.examples} pictures in {part.path!r} are too small: "
            f"config.image_size is {cfg.image_size}, the shorter side of the largest "
            f"has {largest} pixels"
        )
    if sum(usable) < manifest.examples:
        log.warning(
            "%d of %d pictures in %r are smaller than config.image_size %d and are "
            "left out",
            manifest.examples - sum(usable),
            manifest.examples,
            part.path,
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
    cfg, parts, k, process_index, process_count, start, own
) -> tf.data.Dataset:
    # A position is an epoch and a place in it, so resuming reads at most one epoch
    # of raw records and decodes none of what it skips.
    part = parts[k]
    task = tasks.make_task(part.path, part.manifest, cfg.image_size)
    by_file = len(part.manifest.shards) >= process_count
    shard = seqio.ShardInfo(process_index, process_count) if by_file else None
    share = part.weight / sum(other.weight for other in parts)

    def one_epoch(epoch):
        dataset = task.get_dataset(
            # A buffer for each folder, together as large as that of one.
            shuffle_buffer_size=max(1, round(cfg.data.shuffle_examples * share)),
            seed=k * 2**53 + cfg.data.seed % 2**32 * 1_000_003 + epoch,
            shard_info=shard,
            trim_output_features=False,
            try_in_mem_cache=False,
        )
        if not by_file:
            dataset = dataset.shard(process_count, process_index)
        return dataset.map(
            lambda row: row | {"epoch": epoch, "id": row["id"] * len(parts) + k}
        )

    epoch, place = divmod(start, own)
    epochs = tf.data.Dataset.range(epoch, np.iinfo(np.int64).max)
    return epochs.flat_map(one_epoch).skip(place)
