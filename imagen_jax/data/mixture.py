"""Several folders of records as one, each with a weight.

The j-th example of a part with the share w of all weights has the time (j + u) / w, u
in [0, 1) drawn from (seed, part, j), and examples come in the order of their times. So
every stretch has each part's share, the order inside it is random, and how many of each
part precede a position is known without going there.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from imagen_jax.data.crop import PRIME, draw
from imagen_jax.data.manifest import TFDS, Manifest, read_manifest
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

# Of `draw`; crops, squares and flips have the others.
_PURPOSE = 4
# Choices made at a time, about.
_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the folders, or the only folder or .npz file.

    Attributes:
      path: where it lies.
      weight: how often it is drawn from, relative to the others.
      manifest: what is in it.
    """

    path: str
    weight: float
    manifest: Manifest


def read_parts(records: str) -> list[Part]:
    """What `config.data.records` names.

    Args:
      records: one folder or .npz file, "tfds:NAME" (`tfds_records`), or of folders and
        these several with weights: "DIR:WEIGHT,DIR:WEIGHT,...".

    Raises:
      UserError: for records that are not right, weights that are no numbers above
        zero, and folders that do not go together.
    """
    if "," not in records or epath.Path(records).exists():
        return [Part(records, 1.0, _manifest(records))]
    names = [_split(part) for part in records.split(",")]
    parts = [Part(path, weight or 1.0, _manifest(path)) for path, weight in names]
    _check(parts)
    if not all(weight for _, weight in names):
        example = ",".join(f"{p.path}:{p.manifest.examples}" for p in parts)
        raise UserError(
            f"config.data.records is {records!r}: give every folder a weight above "
            f"zero, DIR:WEIGHT. With {example!r} all pictures come equally often"
        )
    return parts


def _manifest(path: str) -> Manifest:
    if not path.startswith(TFDS):
        return read_manifest(path)
    start_tensorflow()
    from imagen_jax.data import tfds_records

    return tfds_records.read_manifest(path.removeprefix(TFDS))


def _split(part: str) -> tuple[str, float]:
    """The path and the weight; 0 for none that can be used."""
    path, colon, number = part.strip().rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return part.strip(), 0.0
    if not colon:
        return part.strip(), 0.0
    return path, weight if 0 < weight < math.inf else 0.0


def _check(parts: Sequence[Part]) -> None:
    for part in parts:
        if epath.Path(part.path).is_file():
            raise UserError(
                f"{part.path!r} is a file: only folders of records can be mixed; "
                "prepare it into a folder"
            )
    for i, part in enumerate(parts):
        for other in parts[:i]:
            _check_pair(other, part)


def _check_pair(one: Part, other: Part) -> None:
    texts = [(p.manifest.encoder, p.manifest.text_dim) for p in (one, other)]
    if texts[0] != texts[1]:
        raise UserError(
            f"{one.path!r} and {other.path!r} cannot be mixed: the first has text of "
            f"the encoder {texts[0][0]!r}, {texts[0][1]} wide, the other of "
            f"{texts[1][0]!r}, {texts[1][1]} wide. Prepare both with one encoder"
        )
    if one.manifest.content_sha256 == other.manifest.content_sha256:
        raise UserError(
            f"{one.path!r} and {other.path!r} hold the same records: name one of them, "
            "with the sum of their weights"
        )


def enter(
    seed: int, weights: Sequence[float], position: int, count: int
) -> tuple[list[int], Iterator[np.ndarray]]:
    """The order in which the parts of a mixture take turns, from `position` on.

    Up to any position n a part with the share w of the weights has come n * w times,
    give or take 1 + w * (number of parts).

    Args:
      seed: of the order.
      weights: of the parts, above zero.
      position: in examples.
      count: in each array.

    Returns:
      how many examples of each part precede `position`, and without end arrays
      `[count]` int64 of the parts that follow, numbered from 0.
    """
    shares = np.asarray(weights, float) / math.fsum(weights)
    # Fewer than `position` examples come before this time.
    time = max(position - len(shares), 0)
    before = _given(seed, shares, time)
    skipped = position - sum(before)
    first = _between(seed, shares, time, time + _CHUNK)
    past = np.bincount(first[:skipped], minlength=len(shares))

    def choices(time=time):
        found = first[skipped:]
        while True:
            while len(found) < count:
                time += _CHUNK
                more = _between(seed, shares, time, time + _CHUNK)
                found = np.concatenate([found, more])
            yield found[:count]
            found = found[count:]

    return [int(a + b) for a, b in zip(before, past)], choices()


def _times(seed, share, part, numbers):
    return (numbers + draw(seed, numbers, part, _PURPOSE) / PRIME) / share


def _given(seed, shares, time) -> list[int]:
    """How many examples of each part have times before `time`."""
    counts = []
    for part, share in enumerate(shares):
        count = max(int(time * share) - 1, 0)
        while _times(seed, share, part, np.int64(count)) < time:
            count += 1
        counts.append(count)
    return counts


def _between(seed, shares, start, stop) -> np.ndarray:
    """The parts whose examples have times in [start, stop), in their order."""
    first, last = (_given(seed, shares, time) for time in (start, stop))
    numbers = [np.arange(a, b, dtype=np.int64) for a, b in zip(first, last)]
    parts = np.repeat(np.arange(len(shares)), [len(own) for own in numbers])
    times = [
        _times(seed, share, part, own)
        for part, (share, own) in enumerate(zip(shares, numbers))
    ]
    return parts[np.argsort(np.concatenate(times), kind="stable")]
