"""From a config to batches on the devices, whatever its records are."""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.batch import Batch
from imagen_jax.config import StageConfig
from imagen_jax.data import memory, order, start_tensorflow
from imagen_jax.data.choice import choice
from imagen_jax.data.manifest import TFDS, Manifest, Source, read_manifest, with_text
from imagen_jax.errors import UserError
from imagen_jax.files import parse_json

log = logging.getLogger(__name__)

# Of a caption that `first` shows.
_CAPTION_BYTES = 512

# Batches of one's own, or a function of n to the n-th and all that follow.
OwnBatches = Iterable[Batch] | Callable[[int], Iterator[Batch]]


def read_sources(records: str) -> list[Source]:
    """The sources that `config.data.records` names.

    One folder or .npz file, "tfds:NAME", or a mixture of folders and data sets with
    weights: "DIR:WEIGHT,DIR:WEIGHT,...".
    """
    # A folder may have a comma in its name.
    is_one = "," not in records
    if is_one or "://" not in records and epath.Path(records).exists():
        return [Source(records, 1.0, _read_manifest(records))]
    named = [_split(word.strip()) for word in records.split(",")]
    sources = [Source(path, weight, _read_manifest(path)) for path, weight in named]
    for source in sources:
        if source.is_npz:
            raise UserError(
                f"{source.path!r} is a file: only folders of records can be mixed; "
                "prepare it into a folder"
            )
    texts = {(s.manifest.encoder, s.manifest.text_dim) for s in sources}
    lengths = {s.manifest.text_length for s in sources} - {0}
    if len(texts) > 1 or len(lengths) > 1:
        raise UserError(
            f"{records!r} cannot be mixed: they have text of {sorted(texts)}, cut to "
            f"{sorted(lengths)} tokens; prepare all alike"
        )
    if not all(0 < source.weight < math.inf for source in sources):
        equal = ",".join(f"{s.path}:{s.manifest.examples}" for s in sources)
        raise UserError(
            f"config.data.records is {records!r}: give every folder a weight above "
            f"zero, like {equal!r}"
        )
    return sources


def _read_manifest(path: str) -> Manifest:
    if not path.startswith(TFDS):
        return read_manifest(path)
    start_tensorflow()
    from imagen_jax.data import tfds

    return tfds.read_manifest(path.removeprefix(TFDS))


def _split(word: str) -> tuple[str, float]:
    """Path and weight; the weight is 0 where there is none."""
    path, _, weight = word.rpartition(":")
    try:
        return path, float(weight)
    except ValueError:
        return word, 0.0


def open_sources(cfg: StageConfig) -> tuple[StageConfig, list[Source]]:
    """The config with the text of its records (`with_text`), and their sources."""
    sources = read_sources(cfg.data.records)
    for source in sources:
        cfg = with_text(cfg, source.manifest)
    if not cfg.text.length:
        raise UserError(
            f"{cfg.data.records!r} does not say how many tokens its captions have at "
            "most: set config.text.length"
        )
    return cfg, sources


class Stream:
    """An endless iterator of training batches.

    Two streams of equal arguments yield equal batches, and one that is set to another's
    state yields what the other would have. `iter` begins to read, if nothing has.
    """

    def __init__(
        self,
        batches_from: Callable[[int], Iterator[Batch]],
        mesh: Mesh,
        identity: dict[str, Any],
        faults: dict[int, list[str]] | None = None,
        max_damaged: int = 0,
    ):
        """Starts at the first batch; reads nothing yet.

        Args:
          batches_from: `batches_from(n)` yields this host's rows of batch n and of all
            that follow, as numpy arrays.
          identity: a state with another one is refused.
          faults: gets a line for each record that could not be decoded, by number of
            the batch, before `batches_from` yields it.
          max_damaged: how many such records may come before it is an error.
        """
        self._batches_from = batches_from
        self._sharding = sharding.batch_sharding(mesh)
        self._identity = identity
        self._faults = {} if faults is None else faults
        self._max_damaged = max_damaged
        self._seek(0, 0)

    def _seek(self, batches: int, damaged: int) -> None:
        self._consumed, self._damaged = batches, damaged
        self._host = None
        self._ahead = None

    def __iter__(self) -> "Stream":
        if self._host is None:
            with _readable():
                self._host = self._batches_from(self._consumed)
        return self

    def __next__(self) -> Batch:
        """The next batch: fields as in `batch_spec`, global arrays."""
        batch, _ = self._coming()
        # Copied while the devices work on `batch`; not counted until it is handed out.
        self._ahead = self._read(self._host)
        for fault in self._faults.pop(self._consumed, ()):
            self._damaged += 1
            if self._damaged > self._max_damaged:
                raise UserError(
                    f"more than config.data.max_damaged={self._max_damaged} records "
                    f"cannot be decoded, now {fault}: prepare them again"
                )
            log.warning("passed over %s", fault)
        self._consumed += 1
        return batch

    def _coming(self) -> tuple[Batch, Sequence[bytes]]:
        """The next batch and this host's captions of it, which stays the next."""
        iter(self)
        self._ahead = self._ahead or self._read(self._host)
        if not self._ahead:
            raise UserError(f"there are only {self._consumed} batches to train on")
        return self._ahead

    def _read(self, host: Iterator[Batch]) -> tuple[Batch, Sequence[bytes]] | None:
        with _readable():
            rows = next(host, None)
        if rows is None:
            return None
        place = functools.partial(
            jax.make_array_from_process_local_data, self._sharding
        )
        captions = [b""] * len(rows.id) if rows.caption is None else rows.caption
        return jax.tree.map(place, rows.replace(caption=None)), captions

    def first(self, count: int) -> Batch:
        """The first `count` examples of the first batch, on every host, with captions.

        Captions are cut to 512 bytes. The position stays.
        """
        found = None
        if self._consumed:
            with _readable():
                found = self._read(self._batches_from(0))
        batch, captions = found or self._coming()
        cut = [caption[:_CAPTION_BYTES].ljust(_CAPTION_BYTES) for caption in captions]
        text = np.stack([np.frombuffer(caption, np.uint8) for caption in cut])
        text = jax.make_array_from_process_local_data(self._sharding, text)
        first = jax.jit(
            lambda *arrays: jax.tree.map(lambda x: x[:count], arrays),
            out_shardings=sharding.replicated(self._sharding.mesh),
        )
        batch, text = jax.device_get(first(batch, text))
        captions = [row.tobytes().rstrip() for row in text]
        return batch.replace(caption=np.array(captions, object))

    def get_state(self) -> bytes:
        """The position after the last batch handed out, for any number of hosts."""
        state = {"batches": self._consumed, "identity": self._identity}
        if self._damaged:
            state["damaged"] = self._damaged
        return json.dumps(state).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to the position of `get_state`; `UserError` for one of other records."""
        try:
            values = parse_json(state, "a position")
            batches, identity = values["batches"], values["identity"]
            names, damaged = self._identity | identity, values.get("damaged", 0)
            for count in (batches, damaged):
                if type(count) is not int or not 0 <= count < 2**40:
                    raise ValueError
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
        self._seek(batches, damaged)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Makes an `OSError` a `UserError`; `train` would blame it on the workdir."""
    try:
        yield
    except OSError as error:
        raise UserError(f"a batch cannot be read: {error}") from error


def open_records(
    cfg: StageConfig, mesh: Mesh, rows: np.ndarray | None = None, heldout: bool = False
) -> Stream:
    """The batches of `config.data.records` on this host.

    Their order (`imagen_jax.data.order`) is a function of the config and the records.
    Of K mixed sources, the k-th has the example numbers that are k modulo K.
    `rows` `[n]` int64 are the rows of every batch that are wanted here, ascending; by
    default those that this host's devices hold. `heldout` opens the records that
    training does not see, by one reader on every host.
    """
    if heldout:
        data = dataclasses.replace(cfg.data, readers=1, shuffle_examples=1)
        cfg = dataclasses.replace(cfg, data=data)
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
    if cfg.data.filter:
        identity["data.filter"] = list(cfg.data.filter)
    if cfg.data.heldout_share:
        identity["data.heldout_share"] = cfg.data.heldout_share
    if sources[0].is_npz:
        batches_from = memory.open_npz(cfg, sources[0], rows, heldout)
        return Stream(batches_from, mesh, identity)

    blocks = order.count_blocks(cfg, usable)
    groups = [order.group_sizes(shards, blocks) for shards in usable]
    weights = [source.weight for source in sources]
    if mixed:
        identity["data.records' weights"] = weights
    identity["data.shuffle_examples"] = cfg.data.shuffle_examples
    identity["data.readers"] = blocks
    identity["data.square"] = cfg.data.square
    readers = [len(sizes) for sizes in groups]
    host_reads = functools.partial(
        order.host_reads, cfg, weights, blocks, readers, rows
    )
    read = len(next(host_reads(0)[1])[0])
    if read > 2 * len(rows) and not heldout:
        log.warning(
            "this host reads %.3g times as many records as it keeps: set "
            "config.data.readers to the number of hosts, and prepare at least as many "
            "files (a smaller --shard_examples)",
            read / len(rows),
        )
    for source in sources:
        # Each host looks at its share of the files.
        source.check_files(jax.process_index(), jax.process_count())
    chosen = [choice(cfg.data, source, heldout) for source in sources]
    faults = {}

    @functools.cache
    def reader() -> Callable[[int], Iterator[Batch]]:
        start_tensorflow()
        from imagen_jax.data import records

        return records.batch_reader(
            cfg, sources, chosen, groups, host_reads, len(rows), faults, heldout
        )

    # TensorFlow is imported when the first batch is asked for, not before.
    return Stream(lambda n: reader()(n), mesh, identity, faults, cfg.data.max_damaged)


def open_batches(source: OwnBatches, mesh: Mesh) -> Stream:
    """A stream of one's own batches, which hold this host's rows as numpy arrays.

    A run that is resumed passes over those that it has had: they must come in the same
    order again. Only a function can go back, which `on_spent_budget="rollback"` needs.
    """
    identity = {"records": "batches of one's own"}
    if callable(source):
        return Stream(source, mesh, identity)
    numbered = enumerate(source)
    newest = [next(numbered, None)]

    def batches_from(wanted: int) -> Iterator[Batch]:
        while newest[0]:
            number, batch = newest[0]
            if number > wanted:
                raise UserError("one's own batches go back only if a function has them")
            if number == wanted:
                yield batch  # again if `first` has had it
                wanted += 1
            newest[0] = next(numbered, None)

    return Stream(batches_from, mesh, identity)


def read_heldout(cfg: StageConfig, mesh: Mesh) -> list[Batch]:
    """Batches of `training.heldout_images` examples or a little more, placed."""
    count = -(-cfg.training.heldout_images // cfg.training.batch_size)
    return list(itertools.islice(open_records(cfg, mesh, heldout=True), count))


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
            "%d of %d images in %r are left out, smaller than config.image_size %d",
            manifest.examples - sum(usable),
            manifest.examples,
            source.path,
            cfg.image_size,
        )
    return usable
