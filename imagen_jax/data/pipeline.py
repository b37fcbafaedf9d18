"""The tf.data pipeline from a folder of records to the batches of a host."""

import functools
import logging
import os
from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf
from jax.sharding import Mesh

from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig
from imagen_jax.data import mixture, readers, stream
from imagen_jax.data import records as tasks
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

log = logging.getLogger(__name__)

# Beyond it decoding is not what limits a host, and other work wants its cores.
_MAX_THREADS = 32


def make_pipeline(
    cfg: StageConfig, mesh: Mesh, rows: np.ndarray | None = None
) -> stream.Stream:
    """Batches from a folder of records, or from several that are mixed.

    Their order is a function of the config and the records (`readers`): any number of
    hosts has together the same batches. Every share of the files is shuffled, files
    and then records within data.shuffle_examples, by (data.seed, epoch).

    Of K mixed folders the k-th has ids that are k modulo K.

    Args:
      cfg: the stage.
      mesh: over whose data and fsdp axes a batch is spread.
      rows: of every batch that are wanted here, ascending; by default those that
        this host's devices hold.

    Raises:
      UserError: when the records are missing, incomplete, of another text encoder,
        or too small, and when data.readers does not divide the batch.
    """
    start_tensorflow()
    parts = mixture.read_parts(cfg.data.records)
    for part in parts:
        stream.check_text(cfg, part.manifest)
    files = [check_sizes(cfg, part) for part in parts]
    held = stream.rows_here(cfg, mesh) if rows is None else rows
    count = readers.count_readers(cfg, files)
    streams = [readers.count_streams(usable, count) for usable in files]
    weights = [part.weight for part in parts]

    def enter(start):
        return readers.enter(cfg, weights, count, streams, held, start)

    openers = [_opener(cfg, parts, k, n) for k, n in enumerate(streams)]
    _, choices = enter(0)
    _log_waste(len(next(choices)[0]), len(held))

    def batches_from(start: int) -> Iterator[Batch]:
        opened, choices = enter(start)
        raw = [openers[k](stream, position) for k, stream, position in opened]
        if len(parts) == 1:
            numbers = tf.data.Dataset.from_tensors(next(choices)).repeat()
        else:
            numbers = tf.data.Dataset.from_generator(
                lambda: enter(start)[1],
                output_signature=(
                    tf.TensorSpec([None], tf.int64),
                    tf.TensorSpec([None], tf.bool),
                ),
            )
        numbers = numbers.unbatch()
        sources, own = numbers.map(_first), numbers.map(_second)
        dataset = tf.data.Dataset.choose_from_datasets(raw, sources)
        # Several hosts that hold rows of one reader each leave out the others'.
        dataset = tf.data.Dataset.zip(dataset, own).filter(_second).map(_first)
        dataset = tasks.StageFeatureConverter(cfg)(
            dataset,
            {
                "image": cfg.train_size,
                "text": cfg.text.length,
                "id": 1,
                "epoch": 1,
                "int8": 1,
            },
        )
        dataset = dataset.batch(len(held), drop_remainder=True).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = min(
            os.cpu_count() or 1, _MAX_THREADS
        )
        try:
            for fields in dataset.with_options(options).as_numpy_iterator():
                yield Batch(**fields)
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as error:
            raise UserError(
                f"{cfg.data.records!r} has a record that is not what it was prepared "
                f"to be: {error.message.splitlines()[0]}\nCopy or prepare them again; "
                "the same command then goes on from the last checkpoint"
            ) from None
        except tf.errors.OpError as error:
            raise UserError(
                f"{cfg.data.records!r} cannot be read any more: "
                f"{error.message.splitlines()[0]}\nThe same command goes on from the "
                "last checkpoint when it can be"
            ) from None

    contents = [part.manifest.content_sha256 for part in parts]
    usable = [sum(counts) for counts in files]
    if len(parts) == 1:
        identity = stream.identity(cfg, contents[0], usable[0])
    else:
        identity = stream.identity(cfg, contents, usable)
        identity["data.records' weights"] = weights
    identity["data.shuffle_examples"] = cfg.data.shuffle_examples
    identity["data.readers"] = count
    identity["data.square"] = cfg.data.square
    return stream.Stream(batches_from, mesh, identity)


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


def _log_waste(read: int, kept: int) -> None:
    if read > 2 * kept:
        log.warning(
            "this host reads %.3g times as many records as it keeps, as several hosts "
            "share a reader: set config.data.readers to the number of hosts, and "
            "prepare at least as many files (a smaller --shard_examples)",
            read / kept,
        )


def _opener(cfg, parts, k, count):
    """How a stream of a folder is opened: of `count`, the g-th at a position."""
    part = parts[k]
    task = tasks.make_task(part.path, part.manifest, cfg.image_size)
    # A buffer for each stream, together as large as the config says.
    share = part.weight / sum(other.weight for other in parts) / count
    shares = readers.shares(part.manifest.large_enough(cfg.image_size), count)

    # Traced once, not for every stream: that takes a fifth of a second.
    @functools.partial(tf.function, autograph=False)
    def one_epoch(stream, epoch):
        dataset = task.get_dataset(
            shuffle_buffer_size=max(1, round(cfg.data.shuffle_examples * share)),
            seed=k * 2**53 + cfg.data.seed % 2**32 * 1_000_003 + epoch,
            shard_info=seqio.ShardInfo((stream + epoch) % count, count),
            trim_output_features=False,
            try_in_mem_cache=False,
        )
        added = {"epoch": epoch, "int8": part.manifest.embedding_dtype == "int8"}
        return dataset.map(lambda row: row | added | {"id": row["id"] * len(parts) + k})

    def open_stream(stream: int, position: int) -> tf.data.Dataset:
        # A position is an epoch and a place in it, so resuming reads at most one epoch
        # of raw records and decodes none of what it skips.
        epoch, place = readers.seek(shares, stream, position)
        epochs = tf.data.Dataset.range(epoch, np.iinfo(np.int64).max)
        number = tf.constant(stream, tf.int64)
        return epochs.flat_map(lambda epoch: one_epoch(number, epoch)).skip(place)

    return open_stream


def _first(one, other):
    return one


def _second(one, other):
    return other
