"""The order of examples: a function of the config, the records and a position.

A batch is cut into data.readers equal blocks of rows. The shards (files) of a folder
are dealt into groups: as many as blocks or, where shards are too few, a divisor of
that. Each group has a reader, from which one block or several neighbours take their
records; a host runs the readers of the blocks whose rows it holds. In epoch e, reader g
of n reads the shards of group (g + e) % n, so that after n epochs it has read every
record once, however unequal the groups are.

Each block takes turns between the folders of a mixture. The j-th example of a folder
with the share w of all weights has the time (j + u) / w, with u in [0, 1) drawn from
(seed, folder, j), and examples come in the order of their times. So every stretch has
the share of each folder, in random order, and how many examples of each precede a
position is known without going through them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError

PRIME = 2**31 - 1
# Purposes of `draw`: the crop's row and column are 0 and 1.
_SQUARE, _FLIP, _TURN, HELDOUT = 2, 3, 4, 5
# Time that turns are drawn for at once: about as many examples.
_STRETCH = 4096
# Blocks of a batch when nothing is configured: so many hosts read without overlap.
_DEFAULT_BLOCKS = 8
# Share by which the smallest group may then be smaller than the largest: until n epochs
# have passed, records of small groups come so much more often.
_UNEVEN = 0.1


def draw(seed: int, numbers, epoch, purpose) -> Any:
    """`[...]` int64 in [0, 2**31 - 1), drawn evenly by the four int64 arguments.

    Only the operators `+ * %`: numpy and TensorFlow get the same integers.
    """
    mixed = numbers * 0 + seed % PRIME
    for value in (numbers, epoch, purpose):
        mixed = (mixed * 48_271 + value % PRIME + 1) % PRIME
        # x**5 permutes the residues of this prime; products stay below 2**62.
        square = mixed * mixed % PRIME
        mixed = square * square % PRIME * mixed % PRIME
    return mixed


def crop_corner(cfg: StageConfig, ids, epoch) -> tuple[Any, Any]:
    """Row and column of the upper left pixel of a training crop: two `[...]` int64.

    Crops lie on multiples of image_size / lowres_size pixels, so that the low-res of a
    crop is a crop of the whole image's low-res. `ids` `[...]` are example numbers,
    `epoch` is `[...]` or `[]`; both int64, numpy or TensorFlow.
    """
    step = cfg.image_size // cfg.lowres_size if cfg.lowres_size else 1
    places = (cfg.image_size - cfg.crop_size) // step + 1
    return tuple(
        draw(cfg.data.seed, ids, epoch, axis) % places * step for axis in (0, 1)
    )


def square_start(cfg: StageConfig, ids, epoch, extra) -> Any:
    """First pixel, along an image's longer side, of the square that is trained on.

    `[...]` int64 in [0, extra], where the longer side is `extra` `[...]` pixels longer;
    `ids` and `epoch` as in `crop_corner`.
    """
    if cfg.data.square == "middle":
        return extra // 2
    return draw(cfg.data.seed, ids, epoch, _SQUARE) % (extra + 1)


def is_flipped(cfg: StageConfig, ids, epoch) -> Any:
    """Whether data.flip mirrors an image in an epoch: `[...]` bool, half are True."""
    return draw(cfg.data.seed, ids, epoch, _FLIP) % 2 == 1


def count_blocks(cfg: StageConfig, usable: Sequence[Sequence[int]]) -> int:
    """Number of blocks of a batch: data.readers, or what suits the records.

    `usable` has the examples in each shard of each folder that the stage can use.
    """
    batch, count = cfg.training.batch_size, cfg.data.readers
    if count:
        if batch % count:
            raise UserError(
                f"config.data.readers is {count}, which does not divide "
                f"config.training.batch_size {batch}: use a divisor, or 0"
            )
        return count
    count = math.gcd(batch, _DEFAULT_BLOCKS)
    while True:
        groups = [_deal(shards, count) for shards in usable]
        if all(min(own) >= (1 - _UNEVEN) * max(own) for own in groups):
            return count
        count //= 2


def group_sizes(shards: Sequence[int], blocks: int) -> list[int]:
    """Examples in each group of a folder's shards; no group is empty.

    There are as many groups as the largest possible divisor of `blocks`.
    """
    divisors = (d for d in range(blocks, 0, -1) if blocks % d == 0)
    return next(groups for d in divisors if min(groups := _deal(shards, d)) > 0)


def _deal(shards: Sequence[int], count: int) -> list[int]:
    return [sum(shards[g::count]) for g in range(count)]


def seek(groups: Sequence[int], reader: int, position: int) -> tuple[int, int]:
    """Epoch of a reader after `position` records, and how many of it are read.

    `groups` are the `group_sizes` of the folder.
    """
    rounds, rest = divmod(position, sum(groups))
    lengths = np.roll(groups, -reader)
    ends = np.cumsum(lengths)
    epoch = int(np.searchsorted(ends, rest, side="right"))
    place = rest - int(ends[epoch] - lengths[epoch])
    return rounds * len(groups) + epoch, place


def turns(
    seed: int, weights: Sequence[float], position: int
) -> tuple[list[int], Iterator[int]]:
    """The order in which the folders of a mixture take turns.

    Up to any position n, a folder with the share w of the weights has had n * w turns,
    give or take 1 + w * (number of folders).

    Returns:
      how many turns each folder had before `position`, in examples; and, endlessly,
      the numbers of the folders that follow.
    """
    shares = np.asarray(weights, float) / math.fsum(weights)
    # Fewer than `position` examples come before this time.
    start = max(position - len(shares), 0)
    before = _turns_before(seed, shares, start)
    first = _turns_between(seed, shares, start, start + _STRETCH)
    skipped = position - sum(before)
    past = np.bincount(first[:skipped], minlength=len(shares))

    def following():
        yield from first[skipped:]
        for time in itertools.count(start + _STRETCH, _STRETCH):
            yield from _turns_between(seed, shares, time, time + _STRETCH)

    return [n + int(m) for n, m in zip(before, past)], following()


def _times(seed, share, folder, numbers):
    return (numbers + draw(seed, numbers, folder, _TURN) / PRIME) / share


def _turns_before(seed, shares, time) -> list[int]:
    """Number of examples of each folder whose time is before `time`."""
    counts = []
    for folder, share in enumerate(shares):
        count = max(int(time * share) - 1, 0)
        while _times(seed, share, folder, np.int64(count)) < time:
            count += 1
        counts.append(count)
    return counts


def _turns_between(seed, shares, start, stop) -> np.ndarray:
    """Folders `[n]` of the examples with times in [start, stop), in their order."""
    first, last = (_turns_before(seed, shares, time) for time in (start, stop))
    numbers = [np.arange(a, b, dtype=np.int64) for a, b in zip(first, last)]
    folders = np.repeat(np.arange(len(shares)), [len(own) for own in numbers])
    times = [
        _times(seed, share, folder, own)
        for folder, (share, own) in enumerate(zip(shares, numbers))
    ]
    return folders[np.argsort(np.concatenate(times), kind="stable")]


def host_reads(
    cfg: StageConfig,
    weights: Sequence[float],
    blocks: int,
    readers: Sequence[int],
    rows: np.ndarray,
    start: int,
) -> tuple[list[tuple[int, int, int]], Iterator[tuple[np.ndarray, np.ndarray]]]:
    """What a host reads from batch `start` on.

    Args:
      cfg, weights, blocks: the stage, the folders' weights, `count_blocks`.
      readers: number of readers of each folder.
      rows: `[n]` int64, the rows of every batch that the host holds, ascending.
      start: number of the first batch.

    Returns:
      the readers to run, each (folder, reader, position in records), and an endless
      iterator that gives for each batch which of them yields the next record, `[m]`
      int64, and whether that is one of `rows`, `[m]` bool: other hosts' records come
      along where hosts share a reader.
    """
    size = cfg.training.batch_size // blocks
    seed = cfg.data.seed % 2**32 * 1_000_003
    counts, orders = zip(
        *(turns(seed + v, weights, start * size) for v in range(blocks))
    )
    # The reader of each block and folder, numbered through all folders.
    block = np.arange(blocks)[:, None]
    reader = np.cumsum([0, *readers[:-1]]) + block // (blocks // np.asarray(readers))
    position = np.zeros(sum(readers), np.int64)
    np.add.at(position, reader, counts)
    needed = np.unique(reader[rows // size])
    place = np.full(sum(readers), -1)
    place[needed] = np.arange(len(needed))
    own = np.isin(np.arange(cfg.training.batch_size), rows)

    def reads():
        while True:
            folders = np.array([[*itertools.islice(o, size)] for o in orders])
            source = place[np.take_along_axis(reader, folders, 1).ravel()]
            yield source[source >= 0], own[source >= 0]

    names = [(k, g) for k, n in enumerate(readers) for g in range(n)]
    return [(*names[i], int(position[i])) for i in needed], reads()
