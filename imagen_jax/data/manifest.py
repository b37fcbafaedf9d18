"""The manifest of prepared records: what `prepare` wrote, and from what."""

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError, read_json

FILE_NAME = "manifest.json"
FORMAT = 3
# Prefix of the name of a TensorFlow Datasets data set.
TFDS = "tfds:"
# As which TensorFlow Datasets reads a folder of records.
_TFDS_FILES = ("dataset_info.json", "features.json")
# The arguments of a job; a folder that has it and no manifest is not finished.
JOB_FILE = "prepare.json"
QUARANTINE_FILE = "quarantine.jsonl"
# The manifest of a folder of images without embeddings.
PICTURES_FILE = "pictures.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set."""

    settings: dict[str, Any]  # arguments of `prepare`: source, text_length, ...
    # Hash of the names and sizes of the source's files, and of its captions where they
    # are known before images are read.
    source_sha256: str = ""
    encoder: str  # identity of the text encoder
    text_dim: int  # width of one token's embedding
    embedding_dtype: str  # one of `embeddings.DTYPES`
    # "mean" and "worst" 1 - cosine between a token's embedding and what is stored.
    cosine_error: dict[str, float] = dataclasses.field(default_factory=dict)
    examples: int  # number of records
    text_bytes: int = 0  # all embeddings
    image_bytes: int  # all image files
    tokens_max: int = 0  # longest caption as stored
    tokens_mean: float = 0.0
    cut_captions: int = 0  # captions cut to text_length tokens
    # Images encoded again: reduced, transparent, rotated, 16 bit, CMYK, WebP, ...
    reencoded: int = 0
    skipped: int = 0  # examples of the source that are not in the records
    # The first of them as {"file", "reason"}; QUARANTINE_FILE has all.
    skipped_files: list[dict[str, str]] = dataclasses.field(default_factory=list)
    # {"file", "examples", "sha256", "sides", "lengths"} for each file of records, or
    # for the one .npz file: "sides" counts images by their shorter side in pixels,
    # "lengths" counts captions by their tokens. Files of records also have "bytes" and
    # "head_sha256".
    shards: list[dict[str, Any]]

    @property
    def text_length(self) -> int:
        """Tokens to which captions were cut; 0 when that is not known."""
        return self.settings.get("text_length", 0)

    @functools.cached_property
    def content_sha256(self) -> str:
        """Hash of the records and their encoder; the folder's name is not part."""
        content = [self.encoder, [shard["sha256"] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def large_enough(self, image_size: int) -> list[int]:
        """Images in each shard whose shorter side has at least `image_size` pixels."""
        return [
            sum(n for side, n in shard["sides"].items() if int(side) >= image_size)
            for shard in self.shards
        ]


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the data sets that `config.data.records` names."""

    path: str  # a folder of records, a .npz file, or "tfds:NAME"
    weight: float  # how often it is drawn from, relative to the others
    manifest: Manifest

    @property
    def is_npz(self) -> bool:
        """Whether it is read without TensorFlow, into memory."""
        return not self.path.startswith(TFDS) and epath.Path(self.path).is_file()


def to_json(manifest: Manifest) -> str:
    """The text of a manifest file."""
    values = {"format": FORMAT} | dataclasses.asdict(manifest)
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def from_values(values: dict[str, Any], where: str) -> Manifest:
    """The manifest in the JSON object of `to_json`; `where` names it in errors."""
    found = values.pop("format", None)
    if found != FORMAT:
        raise UserError(
            f"{where} has format {found}, this version reads format {FORMAT}: prepare "
            "the records again, into a new folder"
        )
    try:
        return Manifest(**values)
    except TypeError as error:
        raise UserError(f"{where} is damaged, prepare again: {error}") from None


def head_sha256(file: BinaryIO) -> str:
    """Hash of the first 64 KiB of an open file."""
    return hashlib.sha256(file.read(2**16)).hexdigest()


def read_manifest(records: str | os.PathLike) -> Manifest:
    """The manifest of a folder of records or of a .npz file.

    Raises:
      UserError: when there is none, or files that it names are missing.
    """
    path = epath.Path(records)
    if not str(records) or not path.exists():
        raise UserError(
            f"there is no {str(records)!r}: give config.data.records the output of "
            "`python -m imagen_jax.prepare`"
        )
    if not path.is_dir():
        return _read_npz_manifest(path)
    # One listing instead of a question for each file: buckets answer slowly.
    names = {file.name for file in path.iterdir()}
    if FILE_NAME not in names:
        raise UserError(
            f"{str(path)!r} has no {FILE_NAME}: it is half-written, or has pictures "
            "without embeddings; run `prepare` again, or on these pictures"
        )
    file = path / FILE_NAME
    manifest = from_values(read_json(file, "the manifest of records"), str(file))
    files = [*_TFDS_FILES, *(shard["file"] for shard in manifest.shards)]
    missing = [file for file in files if file not in names]
    if missing:
        raise UserError(
            f"{str(path)!r} lacks {len(missing)} of its {len(files)} files, "
            f"first {missing[0]!r}: copy it again or prepare again"
        )
    return manifest


def _read_npz_manifest(path: epath.Path) -> Manifest:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            values = json.loads(str(file["manifest"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(
            f"{str(path)!r} is no .npz file of `prepare`, or is damaged: prepare again"
        ) from None
    return from_values(values, str(path))


def with_text(cfg: StageConfig, manifest: Manifest) -> StageConfig:
    """The config with the text of the records: encoder, width and length."""
    theirs = {"encoder": manifest.encoder, "dim": manifest.text_dim}
    if manifest.text_length:
        theirs["length"] = manifest.text_length
    for name, value in theirs.items():
        ours = getattr(cfg.text, name)
        if ours and ours != value:
            raise UserError(
                f"config.text.{name} is {ours!r}, the records {cfg.data.records!r} "
                f"have {value!r}: set it to {type(value)()!r} to take theirs, or "
                "prepare other records"
            )
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **theirs))
