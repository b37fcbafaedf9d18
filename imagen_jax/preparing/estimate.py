"""How much a job will write, from its first examples."""

import dataclasses
import itertools
import shutil

from imagen_jax.preparing.job import Job
from imagen_jax.preparing.selection import Chosen, select

_SAMPLE = 64


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a job is expected to write.

    Attributes:
      sample: examples that it was estimated from.
      examples: of the source that can be used; None when it does not know.
      exact: whether the source knows how many it has.
      image_bytes: of one picture as it is stored.
      text_bytes: of one caption's embedding.
      free_bytes: on the disk of the output.
    """

    sample: int
    examples: int | None
    exact: bool
    image_bytes: float
    text_bytes: float
    free_bytes: int

    def __str__(self) -> str:
        each = self.image_bytes + self.text_bytes
        parts = f"{size(self.image_bytes)} a picture"
        if self.text_bytes:
            parts += f", {size(self.text_bytes)} a caption"
        if self.examples is None:
            room = f"{int(self.free_bytes // max(each, 1)):,}"
            return f"estimated: {parts}; the free disk has room for {room} examples"
        total = self.examples * each
        line = (
            f"estimated: {size(total)} for {'' if self.exact else 'about '}"
            f"{self.examples:,} examples ({parts}), "
            f"{size(self.free_bytes)} free"
        )
        return line + ("; THIS DOES NOT FIT" if total > self.free_bytes else "")


def estimate(job: Job) -> Estimate | None:
    """From the first examples of the first shard; None if none of them can be used.

    Pictures are opened and captions are tokenised, but not embedded.
    """
    first = itertools.islice(job.originals.read(0), _SAMPLE)
    items = list(select(first, job.rules))
    chosen = [item for item in items if isinstance(item, Chosen)]
    if not chosen:
        return None
    text = (
        sum(job.embedder.expected_bytes(c.caption) for c in chosen)
        if (job.embedder)
        else 0
    )
    count = job.originals.count
    folder = job.folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Estimate(
        len(items),
        None if count is None else round(count * len(chosen) / len(items)),
        job.originals.exact,
        sum(len(c.picture.data) for c in chosen) / len(chosen),
        text / len(chosen),
        shutil.disk_usage(there).free,
    )


def size(count: float) -> str:
    """A number of bytes for people: 1,234 B, 12 kB, 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
