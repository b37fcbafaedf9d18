"""What `prepare` wrote beside its records, or inside its .npz file."""

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
from imagen_jax.errors import UserError
from imagen_jax.text.embeddings import DTYPES

FILE_NAME = "manifest.json"
FORMAT = 3
# In front of the name of a data set of TensorFlow Datasets.
TFDS = "tfds:"
# What a job was asked for; beside it, without a manifest, the job is not finished.
JOB_FILE = "prepare.json"
QUARANTINE_FILE = "quarantine.jsonl"
# In its place in a folder of pictures without embeddings.
PICTURES_FILE = "pictures.json"


# Of counts, far more than there is room for.
_LARGEST = 2**50
_MANIFEST_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A prepared data set.

    Attributes:
      settings: what `prepare` was asked for: source, text_length, image_size, ...
      source_sha256: of the source's names and lengths of files, and of captions where
        they are known before pictures are read.
      encoder: identity of the text encoder.
      text_dim: width of one token's embedding.
      embedding_dtype: "bfloat16" or "int8" (`imagen_jax.text.embeddings`).
      cosine_error: {"mean", "worst"} of 1 - cosine between a token's embedding as the
        encoder gave it and as it is stored.
      examples: number of records.
      text_bytes: of all embeddings.
      image_bytes: of all pictures' files.
      tokens_max: tokens of the longest caption as stored.
      tokens_mean: mean over the captions as stored.
      cut_captions: captions that were longer than text_length and lost their tail.
      reencoded: pictures stored as a file made here in place of their own (reduced,
        transparent, rotated by their EXIF tag, 16 bit, CMYK, WebP, ...).
      skipped: number of examples of the source that are not in the records.
      skipped_files: the first of them, each {"file": ..., "reason": ...}; all are in
        quarantine.jsonl beside the manifest.
      shards: of each file of records {"file", "examples", "sha256", "sides",
        "lengths"}; "sides" counts its pictures by their shorter side in pixels,
        "lengths" its captions by their tokens as stored. In a .npz file the only entry
        is that of the arrays.
    """

    settings: dict[str, Any]
    source_sha256: str
    encoder: str
    text_dim: int
    embedding_dtype: str
    cosine_error: dict[str, float]
    examples: int
    text_bytes: int
    image_bytes: int
    tokens_max: int
    tokens_mean: float
    cut_captions: int
    reencoded: int
    skipped: int
    skipped_files: list[dict[str, str]]
    shards: list[dict[str, Any]]

    @functools.cached_property
    def content_sha256(self) -> str:
        """Of the records and their encoder, wherever the files lie."""
        content = [self.encoder, [shard["sha256"] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def large_enough(self, image_size: int) -> list[int]:
        """Of each shard the number of pictures whose sides have `image_size`."""
        return [
            sum(n for side, n in shard["sides"].items() if int(side) >= image_size)
            for shard in self.shards
        ]

    def longer_than(self, length: int) -> int:
        """Number of captions that are stored with more than `length` tokens."""
        return sum(
            count
            for shard in self.shards
            for tokens, count in shard["lengths"].items()
            if int(tokens) > length
        )


def to_json(manifest: Manifest) -> str:
    """The manifest as it lies on disk."""
    values = {"format": FORMAT} | dataclasses.asdict(manifest)
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str, where: str) -> Manifest:
    """Reads what `to_json` wrote in the file `where`.

    Raises:
      UserError: when it is another format or not complete.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); prepare again") from None
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        what = f"of format {found}" if found else "no manifest"
        raise UserError(
            f"{where} is {what}, this version of the program reads format {FORMAT}: "
            "prepare again, into a new folder"
        )
    names = {field.name for field in dataclasses.fields(Manifest)}
    if set(values) != names:
        raise UserError(
            f"{where} is damaged: {sorted(set(values) ^ names)} missing or unknown; "
            "prepare again"
        )
    wrong = _wrong(values)
    if wrong:
        raise UserError(
            f"{where} is damaged: {wrong} is not what `prepare` writes; copy it again, "
            "or prepare again"
        )
    return Manifest(**values)


def _wrong(values: dict[str, Any]) -> str:
    """The first value that training could stumble on; "" for none.

    A manifest may be a stranger's, and positions are computed from its counts.
    """
    for field in dataclasses.fields(Manifest):
        value, kind = values[field.name], typing.get_origin(field.type) or field.type
        kinds = (int, float) if kind is float else kind
        if not (_is_count(value) if kind is int else isinstance(value, kinds)):
            return field.name
    if values["embedding_dtype"] not in DTYPES:
        return "embedding_dtype"
    for number, shard in enumerate(values["shards"]):
        if not _is_shard(shard):
            return f"shards[{number}]"
    if sum(shard["examples"] for shard in values["shards"]) != values["examples"]:
        return "examples"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_shard(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and all(isinstance(shard.get(name), str) for name in ("file", "sha256"))
        and all(isinstance(shard.get(name), dict) for name in ("sides", "lengths"))
        and all(
            key.isdecimal() and len(key) < 10 and _is_count(count)
            for name in ("sides", "lengths")
            for key, count in shard[name].items()
        )
        and _is_count(shard.get("examples"))
        and sum(shard["sides"].values()) == shard["examples"]
    )


def read_manifest(records: str | os.PathLike) -> Manifest:
    """The manifest of a folder of records or of a .npz file.

    Raises:
      UserError: when there is none, or the records it names are not all there.
    """
    if not str(records):
        raise UserError(
            "config.data.records is empty: give a folder or a .npz file that "
            "`python -m imagen_jax.prepare` has written"
        )
    path = epath.Path(records)
    if not path.exists():
        raise UserError(
            f"there is no {str(path)!r}; make it with `python -m imagen_jax.prepare "
            "--source=... --output=...`"
        )
    if path.is_file():
        return _read_npz_manifest(path)
    file = path / FILE_NAME
    if (path / PICTURES_FILE).is_file():
        raise UserError(
            f"{str(path)!r} has pictures without embeddings; add them: `python -m "
            f"imagen_jax.prepare --source=webdataset:{path}/*.tar --output=...`"
        )
    if (path / JOB_FILE).is_file() and not file.is_file():
        raise UserError(
            f"{str(path)!r} is half-written: `prepare` did not finish; run it again"
        )
    if not file.is_file():
        raise UserError(
            f"{str(path)!r} has no {FILE_NAME}: it was not written by "
            "`python -m imagen_jax.prepare`, or not to the end"
        )
    # A pipe has no length, and reading it might not end.
    if not 0 < file.stat().length < _MANIFEST_BYTES:
        raise UserError(f"{str(file)!r} is no manifest: prepare again")
    text = file.read_bytes().decode("utf8", "replace")
    manifest = from_json(text, str(file))
    # One listing, not a question for each file: a bucket takes its time to answer.
    there = {p.name for p in path.iterdir()}
    missing = [s["file"] for s in manifest.shards if s["file"] not in there]
    if missing:
        raise UserError(
            f"{str(path)!r} lacks {len(missing)} of its {len(manifest.shards)} files, "
            f"first {missing[0]!r}: copy it again or prepare again"
        )
    return manifest


def _read_npz_manifest(path: epath.Path) -> Manifest:
    try:
        if not path.stat().length:
            raise ValueError("empty, or a pipe")
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            text = str(file["manifest"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(
            f"{str(path)!r} is no .npz file of `prepare`, or is damaged; make it with "
            "`python -m imagen_jax.prepare --source=... --output=FILE.npz`"
        ) from None
    return from_json(text, str(path))


def check_encoder(cfg: StageConfig, manifest: Manifest) -> None:
    """Raises `UserError` unless the records have the text that the stage expects."""
    have, want = manifest.encoder, cfg.text.encoder
    if want and have != want:
        raise UserError(
            f"the records {cfg.data.records!r} hold text of the encoder {have!r}, "
            f"config.text.encoder is {want!r}: prepare the records with that encoder, "
            "or train a stage of its own"
        )
    if manifest.text_dim != cfg.text.dim:
        raise UserError(
            f"the records {cfg.data.records!r} have embeddings of width "
            f"{manifest.text_dim} ({have!r}), config.text.dim is {cfg.text.dim}"
        )


def with_text(cfg: StageConfig, manifest: Manifest) -> StageConfig:
    """The config with the encoder's identity and width taken from the records.

    Raises:
      UserError: when the config names another encoder.
    """
    text = dataclasses.replace(cfg.text, dim=manifest.text_dim)
    check_encoder(dataclasses.replace(cfg, text=text), manifest)
    text = dataclasses.replace(text, encoder=manifest.encoder)
    return dataclasses.replace(cfg, text=text)
