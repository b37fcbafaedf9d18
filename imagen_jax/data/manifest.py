"""The manifest of prepared records: what `prepare` wrote, and from what."""

import dataclasses
import functools
import hashlib
import json
import os
import typing
import zipfile
from typing import Any

import numpy as np
from etils import epath

from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError, read_json

FILE_NAME = "manifest.json"
FORMAT = 3
# Prefix of the name of a TensorFlow Datasets data set.
TFDS = "tfds:"
# The arguments of a job; a folder that has it and no manifest is not finished.
JOB_FILE = "prepare.json"
QUARANTINE_FILE = "quarantine.jsonl"
# The manifest of a folder of images without embeddings.
PICTURES_FILE = "pictures.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set.

    Attributes:
      settings: the arguments of `prepare`: source, text_length, image_size, ...
      source_sha256: hash of the names and sizes of the source's files, and of its
        captions where they are known before images are read.
      encoder: identity of the text encoder.
      text_dim: width of one token's embedding.
      embedding_dtype: "bfloat16" or "int8" (`imagen_jax.text.embeddings`).
      cosine_error: {"mean", "worst"} of 1 - cosine between a token's embedding as the
        encoder gave it and as it is stored.
      examples: number of records.
      text_bytes: size of all embeddings.
      image_bytes: size of all image files.
      tokens_max: tokens of the longest caption as stored.
      tokens_mean: mean tokens of a caption as stored.
      cut_captions: number of captions that were cut to text_length tokens.
      reencoded: number of images that were encoded again (reduced, transparent,
        rotated by their EXIF tag, 16 bit, CMYK, WebP, ...).
      skipped: number of the source's examples that are not in the records.
      skipped_files: the first of them, each {"file": ..., "reason": ...}; all are in
        quarantine.jsonl beside the manifest.
      shards: for each file of records {"file", "examples", "sha256", "sides",
        "lengths"}; "sides" counts images by their shorter side in pixels, "lengths"
        counts captions by their tokens as stored. A .npz file has one entry.
    """

    settings: dict[str, Any]
    source_sha256: str = ""
    encoder: str
    text_dim: int
    embedding_dtype: str
    cosine_error: dict[str, float] = dataclasses.field(default_factory=dict)
    examples: int
    text_bytes: int = 0
    image_bytes: int
    tokens_max: int = 0
    tokens_mean: float = 0.0
    cut_captions: int = 0
    reencoded: int = 0
    skipped: int = 0
    skipped_files: list[dict[str, str]] = dataclasses.field(default_factory=list)
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


def to_json(manifest: Manifest) -> str:
    """The text of a manifest file."""
    values = {"format": FORMAT} | dataclasses.asdict(manifest)
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str, where: str) -> Manifest:
    """The inverse of `to_json`; `where` names the file in errors.

    Raises:
      UserError: when the text has another format or is damaged.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); prepare again") from None
    return _from_values(values, where)


def _from_values(values: dict[str, Any], where: str) -> Manifest:
    found = values.pop("format", None)
    if found != FORMAT:
        raise UserError(
            f"{where} has format {found}, this version reads format {FORMAT}: prepare "
            "the records again, into a new folder"
        )
    types = typing.get_type_hints(Manifest)
    faults = set(values) ^ set(types) or {
        name
        for name, kind in types.items()
        if not isinstance(values[name], typing.get_origin(kind) or kind)
    }
    if faults:
        raise UserError(
            f"{where} is damaged: {', '.join(sorted(faults))} is not what `prepare` "
            "writes; copy it again, or prepare again"
        )
    return Manifest(**values)


def read_manifest(records: str | os.PathLike) -> Manifest:
    """The manifest of a folder of records or of a .npz file.

    Raises:
      UserError: when there is none, it is damaged, or files that it names are missing.
    """
    path = epath.Path(records)
    if not str(records) or not path.exists():
        raise UserError(
            f"there is no {str(records)!r}: give config.data.records what `python -m "
            "imagen_jax.prepare --source=... --output=...` has written"
        )
    if not path.is_dir():
        return _read_npz_manifest(path)
    # One listing instead of a question for each file: buckets answer slowly.
    names = {file.name for file in path.iterdir()}
    if PICTURES_FILE in names:
        raise UserError(
            f"{str(path)!r} has pictures without embeddings; add them: `python -m "
            f"imagen_jax.prepare --source=webdataset:{path}/*.tar --output=...`"
        )
    if FILE_NAME not in names:
        why = (
            "is half-written: `prepare` did not finish; run it again"
            if JOB_FILE in names
            else f"has no {FILE_NAME}: it was not written by `prepare`"
        )
        raise UserError(f"{str(path)!r} {why}")
    file = path / FILE_NAME
    manifest = _from_values(read_json(file, "the manifest of records"), str(file))
    missing = [s["file"] for s in manifest.shards if s["file"] not in names]
    if missing:
        raise UserError(
            f"{str(path)!r} lacks {len(missing)} of its {len(manifest.shards)} files, "
            f"first {missing[0]!r}: copy it again or prepare again"
        )
    return manifest


def _read_npz_manifest(path: epath.Path) -> Manifest:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            text = str(file["manifest"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(
            f"{str(path)!r} is not a .npz file of `prepare`, or is damaged; make it "
            "with `python -m imagen_jax.prepare --source=... --output=FILE.npz`"
        ) from None
    return from_json(text, str(path))


def with_text(cfg: StageConfig, manifest: Manifest) -> StageConfig:
    """The config with the text of the records: encoder, width and length.

    Raises:
      UserError: when the config sets one of them to another value.
    """
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
