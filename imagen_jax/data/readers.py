"""From which files each row of a batch is read: on any number of hosts the same.

A batch has data.readers equal parts, one after the other, and each belongs to a reader.
The files of a folder are dealt into as many shares as there are readers or, when the
files are too few, a divisor of that; each share is read by a stream, which one reader
or several neighbours take their records from. A host opens the streams of the rows that
it holds. In its e-th epoch the g-th stream reads the share g + e, so that of n shares,
however unequal, each stream has read every record once after n epochs.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from imagen_jax.config import StageConfig
from imagen_jax.data import mixture
from imagen_jax.errors import UserError

# Hosts that read without a share of each other's, when nothing is configured.
_DEFAULT = 8
# By which the smallest share may then be smaller than the largest: until all have gone
# round, records of small shares come so much more often.
_UNEVEN = 0.1


def count_readers(cfg: StageConfig, usable: Sequence[Sequence[int]]) -> int:
    """The parts of a batch.

    Args:
      cfg: the stage.
      usable: of each folder and file the pictures that the stage can use.

    Raises:
      UserError: for data.readers that do not divide the batch.
    """
    batch, count = cfg.training.batch_size, cfg.data.readers
    if count:
        if batch % count:
            near = max(d for d in range(1, count) if batch % d == 0)
            raise UserError(
                f"config.data.readers is {count}, which does not divide "
                f"config.training.batch_size {batch}: use for example {near}, or 0"
            )
        return count
    count = math.gcd(batch, _DEFAULT)
    while any(_uneven(shares(files, count)) for files in usable):
        count //= 2
    return count


def _uneven(counts: list[int]) -> bool:
    return min(counts) < (1 - _UNEVEN) * max(counts)


def shares(files: Sequence[int], count: int) -> list[int]:
    """The pictures of each of `count` shares: the g-th has the files g::count."""
    return [sum(files[g::count]) for g in range(count)]


def count_streams(files: Sequence[int], readers: int) -> int:
    """How many streams a folder has: none is without pictures."""
    divisors = (d for d in range(readers, 0, -1) if readers % d == 0)
    return next(d for d in divisors if min(shares(files, d)) > 0)


def open_files(streams: int) -> int:
    """Files that each of a folder's streams reads by turns: 16 of all, at least one."""
    return max(1, 16 // streams)


def seek(counts: Sequence[int], stream: int, position: int) -> tuple[int, int]:
    """Where a stream is after `position` records: its epoch, and records of that.

    Args:
      counts: `shares` of the folder.
      stream: from 0 on.
      position: in records.
    """
    rounds, rest = divmod(position, sum(counts))
    lengths = np.roll(counts, -stream)
    ends = np.cumsum(lengths)
    epoch = int(np.searchsorted(ends, rest, side="right"))
    place = rest - int(ends[epoch] - lengths[epoch])
    return rounds * len(counts) + epoch, place


def enter(
    cfg: StageConfig,
    weights: Sequence[float],
    readers: int,
    streams: Sequence[int],
    held: np.ndarray,
    start: int,
) -> tuple[list[tuple[int, int, int]], Iterator[tuple[np.ndarray, np.ndarray]]]:
    """What a host reads from a batch on.

    Each reader takes turns between the folders as `mixture.enter` says, by itself.

    Args:
      cfg: the stage.
      weights: of the folders.
      readers: parts of the batch.
      streams: of each folder.
      held: the host's rows of every batch, ascending.
      start: number of the batch.

    Returns:
      the streams to be opened, each (folder, stream, position in records), and without
      end for each batch which of them gives the next records, and which of these are
      the host's: two arrays of one length.
    """
    size = cfg.training.batch_size // readers
    seed = cfg.data.seed % 2**32 * 1_000_003
    entered = [
        mixture.enter(seed + v, weights, start * size, size) for v in range(readers)
    ]
    number = np.arange(readers)[:, None]
    # Of each reader and folder, a stream's number among those of all folders.
    table = np.cumsum([0, *streams[:-1]]) + number // (readers // np.asarray(streams))
    position = np.zeros(sum(streams), np.int64)
    np.add.at(position, table, [counts for counts, _ in entered])
    opened = np.unique(table[held // size])
    place = np.full(sum(streams), -1)
    place[opened] = np.arange(len(opened))
    own = np.isin(np.arange(cfg.training.batch_size), held)

    def choices():
        while True:
            turns = np.stack([next(parts) for _, parts in entered])
            source = place[np.take_along_axis(table, turns, 1).ravel()]
            yield source[source >= 0], own[source >= 0]

    names = [(k, g) for k, count in enumerate(streams) for g in range(count)]
    return [(*names[i], int(position[i])) for i in opened], choices()
