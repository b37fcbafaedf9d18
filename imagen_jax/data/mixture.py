"""The records that a config names: one source, or several that are mixed."""

import dataclasses
import itertools
import math

from etils import epath

from imagen_jax.config import StageConfig
from imagen_jax.data.manifest import TFDS, Manifest, read_manifest, with_text
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of records, a .npz file or a data set of TensorFlow Datasets.

    Attributes:
      path: the folder or file, or "tfds:NAME".
      weight: how often it is drawn from, relative to the others of a mixture.
      manifest: its contents.
    """

    path: str
    weight: float
    manifest: Manifest

    @property
    def is_npz(self) -> bool:
        """Whether it is read without TensorFlow, into memory."""
        return not self.path.startswith(TFDS) and epath.Path(self.path).is_file()


def read_sources(records: str) -> list[Source]:
    """The sources that `config.data.records` names.

    Args:
      records: one folder or .npz file, "tfds:NAME", or a mixture of folders and data
        sets with weights: "DIR:WEIGHT,DIR:WEIGHT,...".

    Raises:
      UserError: for records that are missing or damaged, weights that are not numbers
        above zero, and sources that cannot be mixed.
    """
    if "," not in records or epath.Path(records).exists():
        return [Source(records, 1.0, _manifest(records))]
    named = [_split(word.strip()) for word in records.split(",")]
    sources = [Source(path, weight, _manifest(path)) for path, weight in named]
    for source in sources:
        if source.is_npz:
            raise UserError(
                f"{source.path!r} is a file: only folders of records can be mixed; "
                "prepare it into a folder"
            )
    for one, other in itertools.combinations(sources, 2):
        _check_pair(one, other)
    if not all(weight for _, weight in named):
        example = ",".join(f"{s.path}:{s.manifest.examples}" for s in sources)
        raise UserError(
            f"config.data.records is {records!r}: give every folder a weight above "
            f"zero, DIR:WEIGHT. With {example!r} all images come equally often"
        )
    return sources


def _manifest(path: str) -> Manifest:
    if not path.startswith(TFDS):
        return read_manifest(path)
    start_tensorflow()
    from imagen_jax.data import tfds

    return tfds.read_manifest(path.removeprefix(TFDS))


def _split(word: str) -> tuple[str, float]:
    """Path and weight; the weight is 0 where there is none that can be used."""
    path, _, number = word.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return word, 0.0
    return (path, weight if 0 < weight < math.inf else 0.0) if path else (word, 0.0)


def _check_pair(one: Source, other: Source) -> None:
    a, b = one.manifest, other.manifest
    lengths = {a.text_length, b.text_length} - {0}
    if (a.encoder, a.text_dim) != (b.encoder, b.text_dim) or len(lengths) > 1:
        raise UserError(
            f"{one.path!r} and {other.path!r} cannot be mixed: the first has text of "
            f"the encoder {a.encoder!r}, {a.text_length} x {a.text_dim}, the other of "
            f"{b.encoder!r}, {b.text_length} x {b.text_dim}. Prepare both alike"
        )
    if a.content_sha256 == b.content_sha256:
        raise UserError(
            f"{one.path!r} and {other.path!r} hold the same records: name one of them, "
            "with the sum of their weights"
        )


def open_sources(cfg: StageConfig) -> tuple[StageConfig, list[Source]]:
    """The config with the text of its records (`with_text`), and their sources.

    Raises:
      UserError: as `read_sources`, and when they have other text than the config.
    """
    sources = read_sources(cfg.data.records)
    for source in sources:
        cfg = with_text(cfg, source.manifest)
    if not cfg.text.length:
        raise UserError(
            f"{cfg.data.records!r} does not say how many tokens its captions have at "
            "most: set config.text.length"
        )
    return cfg, sources
