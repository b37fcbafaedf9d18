"""The manifest of prepared records: what `prepare` wrote, and from what."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent import futures
from typing import Any, BinaryIO, get_args, get_origin

from etils import epath

from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError
from imagen_jax.files import is_file_name, parse_json, read_arrays, read_json
from imagen_jax.stores import check_store
from imagen_jax.text import embeddings

FILE_NAME = "manifest.json"
FORMAT = 3
# Prefix of the name of a TensorFlow Datasets data set.
TFDS = "tfds:"
# As which TensorFlow Datasets reads a folder of records.
TFDS_FILES = ("dataset_info.json", "features.json")
# The arguments of a job; a folder that has it and no manifest is not finished.
JOB_FILE = "prepare.json"
QUARANTINE_FILE = "quarantine.jsonl"
# The manifest of a folder of images without embeddings.
PICTURES_FILE = "pictures.json"
NPZ = "a .npz file of `prepare`"
# Of a manifest, and for each file beside it, whose images may have a thousand sides.
_MANIFEST_BYTES, _SHARD_BYTES = 2**26, 2**16
_SHARD = {"file": str, "examples": int, "sha256": str, "sides": dict[str, int]}
# Not in manifests of release 0.1, and not of a .npz file.
_FILE = {"bytes": int, "head_sha256": str}
_THREADS = 32  # threads that check files
_IS_SIZE = re.compile("[0-9]{1,9}").fullmatch


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
    # Files, members or rows of the source, and what became of them: "used",
    # "quarantined", and those passed over by kind, as ".ogg". 0 where nobody counted.
    holds: int = 0
    account: dict[str, int] = dataclasses.field(default_factory=dict)
    # Scores that every record has, by name, and how many of them are not known.
    scores: dict[str, int] = dataclasses.field(default_factory=dict)
    scored: int = 0  # records with at least one that is
    # {"file", "examples", "sha256", "sides"} for each file of records, or for the one
    # .npz file: "sides" counts images by their shorter side in pixels. Files of records
    # also have "bytes" and "head_sha256". Releases up to 0.2 wrote "lengths", too.
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

    def check_files(self, first: int, every: int) -> None:
        """Raises `UserError` unless the files `first::every` are as they were written.

        Lengths and first bytes are compared; records of release 0.1 tell neither.
        """

        def fault(shard: dict) -> str:
            if self.path.startswith(TFDS) or not _FILE.keys() <= shard.keys():
                return ""
            file = epath.Path(self.path) / shard["file"]
            length = file.stat().length
            if length != shard["bytes"]:
                return f"{shard['file']} has {length} bytes, not {shard['bytes']}"
            with file.open("rb") as opened:
                if head_sha256(opened) != shard["head_sha256"]:
                    return f"{shard['file']} holds other records"
            return ""

        with futures.ThreadPoolExecutor(_THREADS) as pool:
            shards = self.manifest.shards[first::every]
            faults = list(filter(None, pool.map(fault, shards)))
        if faults:
            raise UserError(
                f"{len(faults)} files of {self.path!r} are not what its manifest says, "
                f"first: {faults[0]}; copy them again or prepare again"
            )


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
        manifest = Manifest(**values)
        for name in _wrong(manifest):
            raise TypeError(f"{name} is not as `prepare` writes it")
    except TypeError as error:
        raise UserError(f"{where} is damaged, prepare again: {error}") from None
    return manifest


def _wrong(manifest: Manifest) -> Iterator[str]:
    """The fields that are not as `prepare` writes them."""
    for field in dataclasses.fields(Manifest):
        if not _has_type(getattr(manifest, field.name), field.type):
            yield field.name
    if not all(map(_is_shard, manifest.shards)):
        yield "shards"
    # The number of an example is an int32.
    examples = sum(shard["examples"] for shard in manifest.shards)
    if not 0 < examples == manifest.examples <= 2**31:
        yield "examples"
    if manifest.embedding_dtype not in embeddings.DTYPES:
        yield "embedding_dtype"
    if not manifest.text_dim:
        yield "text_dim"
    if not _has_type(manifest.text_length, int):
        yield "settings"


def _is_shard(shard: dict[str, Any]) -> bool:
    return (
        all(_has_type(shard.get(name), kind) for name, kind in _SHARD.items())
        and all(_has_type(shard.get(n, kind()), kind) for n, kind in _FILE.items())
        and is_file_name(shard["file"])
        and all(map(_IS_SIZE, shard["sides"]))
        and sum(shard["sides"].values()) == shard["examples"]
    )


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a field's type, and no number is below zero."""
    if inner := get_args(kind):
        values = value.values() if type(value) is dict else value
        right = type(value) is get_origin(kind)
        return right and all(_has_type(own, inner[-1]) for own in values)
    if kind is float:
        return type(value) in (int, float) and value >= 0
    return kind is Any or type(value) is kind and (kind is str or 0 <= value < 2**63)


def head_sha256(file: BinaryIO) -> str:
    """Hash of the first 64 KiB of an open file."""
    return hashlib.sha256(file.read(2**16)).hexdigest()


def read_manifest(records: str | os.PathLike) -> Manifest:
    """The manifest of a folder of records or of a .npz file.

    Raises:
      UserError: when there is none, or files that it names are missing.
    """
    check_store(os.fspath(records))
    path = epath.Path(records)
    if not str(records) or not path.exists():
        raise UserError(
            f"there is no {str(records)!r}: give config.data.records the output of "
            "`python -m imagen_jax.prepare`"
        )
    if not path.is_dir():
        text = read_arrays(path, NPZ, {"manifest": ("<U", ())})["manifest"]
        values = parse_json(text.tobytes(), f"{str(path)!r} is not {NPZ}")
        return from_values(values, str(path))
    # One listing instead of a question for each file: buckets answer slowly.
    names = {file.name for file in path.iterdir()}
    if FILE_NAME not in names:
        raise UserError(
            f"{str(path)!r} has no {FILE_NAME}: it is half-written, or has pictures "
            "without embeddings; run `prepare` again, or on these pictures"
        )
    file = path / FILE_NAME
    most = _MANIFEST_BYTES + _SHARD_BYTES * len(names)
    values = read_json(file, "the manifest of records", most)
    manifest = from_values(values, str(file))
    files = [*TFDS_FILES, *(shard["file"] for shard in manifest.shards)]
    missing = [file for file in files if file not in names]
    if missing:
        raise UserError(
            f"{str(path)!r} lacks {len(missing)} of its {len(files)} files, "
            f"first {missing[0]!r}: copy it again or prepare again"
        )
    return manifest


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
