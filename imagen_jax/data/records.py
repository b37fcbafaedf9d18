"""Files of records: how they are written, and how tf.data reads them as batches."""

import bisect
import contextlib
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig
from imagen_jax.data import order, preprocess
from imagen_jax.data.choice import nothing_left
from imagen_jax.data.manifest import Manifest, Source
from imagen_jax.data.tfds import DataSource
from imagen_jax.errors import UserError

# With more threads decoding is not what limits a host, and other work wants its cores.
_MAX_THREADS = 32
# Records among which the held-out ones are looked for.
_LOOKED_THROUGH = 2**18


def write_shard(
    path: pathlib.Path, rows: Iterable[dict[str, int | bytes | float]]
) -> None:
    """Writes a TFRecord file.

    Rows have "id"; "image", a JPEG or PNG file; "caption", UTF-8; "text", its
    `embeddings.to_bytes`; "side", pixels of the image's shorter side; and floats, the
    "scores/NAME".
    """

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            fields = {name: feature(value) for name, value in row.items()}
            example = tf.train.Example(features=tf.train.Features(feature=fields))
            # Fields are a map, which has an order only when asked for one.
            writer.write(example.SerializePartialToString(deterministic=True))


def read_rows(folder: str, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """All records as they are stored, always in one order, "scores" as `[K]`."""
    rows = DataSource(folder).get_dataset(shuffle=False).as_numpy_iterator()
    try:
        for row in rows:
            yield row | {"scores": [row["scores"][name] for name in manifest.scores]}
    except tf.errors.OpError as error:
        brief = error.message.splitlines()[0]
        raise UserError(f"the records {folder!r} are damaged: {brief}") from None


def make_task(path: str, manifest: Manifest, image_size: int) -> seqio.Task:
    """The records whose images have at least `image_size` pixels, encoded.

    `path` is a folder or "tfds:NAME". The task is not registered, so that two of the
    same records do not collide.
    """

    def usable(dataset):
        # Data sets of others have no sides; their manifest has one number for all.
        if "side" in dataset.element_spec:
            dataset = dataset.filter(lambda row: row["side"] >= image_size)
        spec = dataset.element_spec.get("caption")
        none = {} if spec == tf.TensorSpec([], tf.string) else {"caption": b""}
        if "scores" not in dataset.element_spec:
            none["scores"] = {}
        return dataset.map(
            lambda row: row | {"id": tf.cast(row["id"], tf.int64)} | none
        )

    return seqio.Task(
        f"records_{manifest.content_sha256[:16]}",
        DataSource(path),
        output_features={
            "image": seqio.ContinuousFeature(dtype=tf.string, rank=0),
            "text": seqio.ContinuousFeature(dtype=tf.string, rank=0),
            "id": seqio.ContinuousFeature(dtype=tf.int64, rank=0),
        },
        preprocessors=[usable],
    )


def batch_reader(
    cfg: StageConfig,
    sources: Sequence[Source],
    chosen: Sequence[Callable | None],
    groups: Sequence[Sequence[int]],
    host_reads: Callable[[int], tuple[list, Iterator]],
    size: int,
    faults: dict[int, list[str]],
    heldout: bool,
) -> Callable[[int], Iterator[Batch]]:
    """A function that yields a host's batches from any number on; it reads ahead.

    `chosen` is the `choice` of each source, `groups` its `order.group_sizes`,
    `host_reads(n)` is `order.host_reads` from batch n on, of which `size` rows are
    kept. `faults[n]` gets a line for each record of batch n that cannot be decoded.
    """
    # No function of a row needs AutoGraph, which reads the source of each when it is
    # traced: a third of a second before the first batch.
    untranslated = tf.autograph.experimental.do_not_convert
    openers = [
        _opener(cfg, sources, k, chosen[k], sizes, heldout)
        for k, sizes in enumerate(groups)
    ]
    options = tf.data.Options()
    options.deterministic = True
    # Buffers are filled from the call on, and not from the first batch that is asked.
    options.experimental_warm_start = True
    # They rewrite the graph for a fifth of a second, and batches come no faster.
    options.experimental_optimization.apply_default_optimizations = False
    options.threading.private_threadpool_size = min(os.cpu_count() or 1, _MAX_THREADS)

    @untranslated
    def rows_from(start: int) -> tf.data.Dataset:
        readers, _ = host_reads(start)
        opened = [openers[k](reader, position) for k, reader, position in readers]
        index = _column(host_reads(start)[1], 0, tf.int64)
        own = _column(host_reads(start)[1], 1, tf.bool)
        rows = tf.data.Dataset.choose_from_datasets(opened, index)
        # Hosts that share a reader leave out each other's rows.
        return tf.data.Dataset.zip(rows, own).filter(lambda row, own: own)

    @untranslated
    def decoded(rows: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
        rows = rows.map(
            lambda row, own: preprocess.example(cfg, row),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        rows = rows.batch(size, drop_remainder=True).prefetch(2)
        return rows.with_options(options).as_numpy_iterator()

    def batches_from(start: int) -> Iterator[Batch]:
        with _explained(cfg):
            return following(decoded(rows_from(start)), start)

    def following(ahead: Iterator[dict], number: int) -> Iterator[Batch]:
        with _explained(cfg):
            while True:
                try:
                    for fields in ahead:
                        yield Batch(**fields)
                        number += 1
                except tf.errors.InvalidArgumentError:
                    rows, found = iter(rows_from(number).with_options(options)), []
                # What is read ahead fails some batches before the record's own.
                while not found:
                    part = (row for row, _ in itertools.islice(rows, size))
                    fields, found = _one_by_one(cfg, sources, part)
                    faults[number] = found
                    yield Batch(**fields)
                    number += 1
                ahead = decoded(rows_from(number))

    return batches_from


@contextlib.contextmanager
def _explained(cfg: StageConfig) -> Iterator[None]:
    """TensorFlow's errors as a `UserError`."""
    try:
        yield
    except tf.errors.OpError as error:
        chooses = cfg.data.filter or cfg.data.heldout_share
        if chooses and "contained only 0 elements" in error.message:
            raise nothing_left(cfg.data.records) from None
        raise UserError(
            f"the records {cfg.data.records!r} are damaged or gone: "
            f"{error.message.splitlines()[0]}: copy or prepare them again; the "
            "same command then goes on from the last checkpoint"
        ) from None


def _one_by_one(
    cfg: StageConfig, sources: Sequence[Source], rows: Iterator[dict[str, tf.Tensor]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Fields of a batch, and what is wrong with the records that do not decode.

    In the place of such a record is the next one of the batch that does.
    """
    found, faults = [], []
    for row in rows:
        try:
            found.append(preprocess.example(cfg, row))
        except tf.errors.InvalidArgumentError as error:
            found.append(None)
            number, k = divmod(int(row["id"]), len(sources))
            reason = re.sub(r"\{\{.*?\}\} *", "", error.message.splitlines()[0])
            faults.append(f"record {number} of {sources[k].path!r}: {reason}")
    good = [i for i, fields in enumerate(found) if fields]
    if not good:
        raise UserError(f"no record of a batch can be decoded: {faults[0]}")
    taken = [
        found[good[bisect.bisect_left(good, i) % len(good)]] for i in range(len(found))
    ]
    return {name: np.stack([f[name] for f in taken]) for name in taken[0]}, faults


def _column(parts: Iterator, place: int, dtype: tf.DType) -> tf.data.Dataset:
    """The numbers in the arrays that each of `parts` has at `place`.

    Under Python 3.11 `Dataset.from_generator` sets glibc's M_MMAP_THRESHOLD to 128 KiB:
    from then on every larger array of a step on a CPU is mapped and unmapped.
    """

    def following(_):
        values = tf.numpy_function(lambda: next(parts)[place], [], dtype)
        return tf.ensure_shape(values, [None])

    return tf.data.Dataset.counter().map(following).unbatch()


def _opener(
    cfg, sources, k, is_chosen, groups, heldout
) -> Callable[[int, int], tf.data.Dataset]:
    """A function that opens a reader of the k-th source at a position."""
    source, count = sources[k], len(groups)
    task = make_task(source.path, source.manifest, cfg.image_size)
    added = {"int8": source.manifest.embedding_dtype == "int8"}
    # Each reader has a buffer; together they are as large as the config says.
    examples = tf.constant(groups, tf.int64)
    share = source.weight / sum(other.weight for other in sources) / count
    buffer = max(1, round(cfg.data.shuffle_examples * share))
    seed = k * 2**53 + cfg.data.seed % 2**32 * 1_000_003

    # Traced once and not for every reader, which would take a fifth of a second each.
    @functools.partial(tf.function, autograph=False)
    def one_epoch(reader, epoch):
        dataset = task.get_dataset(
            shuffle_buffer_size=buffer,
            seed=seed + epoch,
            shard_info=seqio.ShardInfo((reader + epoch) % count, count),
            trim_output_features=False,
            try_in_mem_cache=False,
        )

        # Or the places of a resumed run would be others.
        part = tf.gather(examples, (reader + epoch) % count)
        whole = tf.data.experimental.assert_cardinality(part)
        dataset = dataset.apply(whole)
        if is_chosen:
            # Those that are left come again, until they are as many as all.
            if heldout:
                dataset = dataset.take(_LOOKED_THROUGH)
            dataset = dataset.filter(lambda row: is_chosen(row["id"], row["scores"]))
            dataset = dataset.repeat().take(part).apply(whole)

        def add(row):
            fields = {name: row[name] for name in ("image", "text", "caption")} | added
            return fields | {"epoch": epoch, "id": row["id"] * len(sources) + k}

        return dataset.map(add)

    def open_reader(reader: int, position: int) -> tf.data.Dataset:
        # Resuming passes by at most one epoch of raw records, and decodes none of it.
        epoch, place = order.seek(groups, reader, position)
        epochs = tf.data.Dataset.range(epoch, np.iinfo(np.int64).max)
        number = tf.constant(reader, tf.int64)
        return epochs.flat_map(lambda epoch: one_epoch(number, epoch)).skip(place)

    return open_reader
