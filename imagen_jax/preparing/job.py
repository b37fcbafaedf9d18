"""`prepare` as a job: shards written one by one, by any number of processes.

A folder of records, and while they are being written:

  prepare.json            what the job was asked for; another job is refused
  records-00000.tfrecord  a finished shard; it appears whole or not at all
  records-00000.json      what happened in it; with it the shard is finished
  quarantine.jsonl        written after all shards: what could not be used, and why
  dataset_info.json       with features.json and metadata.json: for tfds
  manifest.json           written last: with it the job is finished

All are written under another name and then renamed. A process works on the shards
whose number modulo the number of processes is its own; the one that finds all of them
finished writes the last files, which are the same whoever writes them. So a job that
was killed continues when it is started again, with any number of processes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from imagen_jax.data import manifest as manifests
from imagen_jax.data.manifest import Manifest
from imagen_jax.errors import UserError, read_json
from imagen_jax.preparing import webdataset
from imagen_jax.preparing.captions import Embedder
from imagen_jax.preparing.settings import NO_ENCODER, Settings
from imagen_jax.preparing.sources import Source, open_source, verify_images
from imagen_jax.preparing.stats import Stats, total

# A share is not judged by fewer examples before all are seen.
_LEAST_EXAMPLES = 1000
# Skipped examples named in the manifest; the quarantine names all.
_NAMED_SKIPS = 100
_TEMPORARY = ".tmp"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be written where.

    Attributes:
      settings: what was asked for.
      source: the examples.
      embedder: embeds their captions; None writes tars of images, without embeddings.
    """

    settings: Settings
    source: Source
    embedder: Embedder | None

    @property
    def output(self) -> pathlib.Path:
        """The folder or file that is written."""
        return self.settings.path

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the output; kept in prepare.json."""
        embedder = self.embedder
        return {
            "format": manifests.FORMAT,
            "settings": self.settings.recorded(),
            "source_sha256": self.source.sha256,
            "encoder": embedder.encoder.identity if embedder else NO_ENCODER,
            "embedding_dtype": embedder.dtype if embedder else NO_ENCODER,
        }

    def shard_file(self, number: int) -> pathlib.Path:
        """The file of a shard."""
        name = (
            f"records-{number:05d}.tfrecord" if self.embedder else f"{number:05d}.tar"
        )
        return self.output / name

    def report_file(self, number: int) -> pathlib.Path:
        """The file that says what happened in a shard."""
        # Beside tars it is named as img2dataset names its own.
        suffix = ".json" if self.embedder else "_stats.json"
        file = self.shard_file(number)
        return file.with_name(file.stem + suffix)

    def report(self, number: int) -> dict[str, Any] | None:
        """The report on a shard that is finished; else None."""
        file = self.report_file(number)
        if not (file.is_file() and self.shard_file(number).is_file()):
            return None
        return read_json(file, "a report of `prepare` on a shard; remove it")


def open_job(settings: Settings, embedder: Embedder | None = None) -> Job:
    """Opens the source of a job.

    Raises:
      UserError: when there is no such source, or it is malformed.
    """
    source = open_source(
        settings.source, settings.image_size, settings.seed, settings.shard_examples
    )
    return Job(settings, source, embedder)


def start(job: Job) -> Manifest | None:
    """Creates the folder of a job, or returns to it.

    Returns:
      the manifest of a job that is finished already, and lacks no file.

    Raises:
      UserError: when the folder holds something else.
    """
    folder = job.output
    file = folder / manifests.JOB_FILE
    if folder.exists() and not folder.is_dir():
        raise not_ours(folder)
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            others = [path for path in folder.iterdir() if path.suffix != _TEMPORARY]
            # Another process may have written it meanwhile.
            if others and not file.exists():
                raise not_ours(folder)
            write_text(file, _json(job.identity()))
    check_same(job, read_json(file, "what a job of `prepare` was asked for"))
    for name in (manifests.FILE_NAME, manifests.PICTURES_FILE):
        if (folder / name).is_file():
            old = manifests.from_json((folder / name).read_text("utf8"), name)
            if all((folder / shard["file"]).is_file() for shard in old.shards):
                return old
    return None


def not_ours(path: pathlib.Path) -> UserError:
    """The error about an output that holds something else."""
    return UserError(
        f"--output={str(path)!r} exists and was not written by this version of "
        "`prepare`: give another name, or remove it"
    )


def check_same(job: Job, old: dict[str, Any]) -> None:
    """Raises `UserError` if the output has another identity, and names what differs."""
    new = job.identity()
    before, now = ({**values, **values["settings"]} for values in (old, new))
    differs = [
        "other pictures or captions"
        if name == "source_sha256"
        else f"{name} {before.get(name)!r}, not {value!r}"
        for name, value in now.items()
        if name != "settings" and before.get(name) != value
    ]
    if differs:
        raise UserError(
            f"--output={job.settings.output!r} was prepared with "
            f"{'; '.join(differs)}: give another name, or remove it"
        )


def run(
    job: Job,
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[..., None] = lambda examples, resumed=False: None,
) -> Manifest | None:
    """Writes this process's shards that are not finished, then what comes last.

    Args:
      job: what to write.
      process_index: the number of this process.
      process_count: number of processes that the shards are divided among.
      progress: is called with numbers of examples that are done with, and `resumed`
        for those of an earlier run.

    Returns:
      the manifest; None while other processes have not finished their shards.

    Raises:
      UserError: when too many examples cannot be used, or the disk is full.
    """
    used, skipped = 0, []
    for number in range(process_index, job.source.shards, process_count):
        report = job.report(number)
        if report:
            progress(report["examples"] + len(report["skipped"]), resumed=True)
        else:
            report = write_shard(job, number, progress)
        used += report["examples"]
        skipped += report["skipped"]
        check_share(job, used, skipped, _LEAST_EXAMPLES)
    reports = []
    for number in range(job.source.shards):
        reports.append(job.report(number))
        if not reports[-1]:
            return None
    return _finish(job, reports)


def _finish(job: Job, reports: list[dict[str, Any]]) -> Manifest:
    """Writes what comes after all shards."""
    folder = job.output
    summary = total(reports, job.source.problems)
    lines = [json.dumps(row, ensure_ascii=False) for row in summary["skipped"]]
    with full_disk(folder):
        write_text(
            folder / manifests.QUARANTINE_FILE, "".join(f"{line}\n" for line in lines)
        )
        check_share(job, summary["examples"], summary["skipped"])
        manifest = make_manifest(job, summary)
        if job.embedder:
            from imagen_jax.data import tfds_records

            examples = [report["examples"] for report in reports]
            for name, text in tfds_records.info_files(manifest, examples).items():
                write_text(folder / name, text)
        name = manifests.FILE_NAME if job.embedder else manifests.PICTURES_FILE
        write_text(folder / name, manifests.to_json(manifest))
    # What killed processes left. After the manifest: another process that is about to
    # write the same file finds it written.
    for path in folder.glob(f"*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
    return manifest


def make_manifest(job: Job, summary: dict[str, Any]) -> Manifest:
    """The manifest of a job; `summary` is the `total` of its reports."""
    values = job.identity() | summary
    del values["format"]
    values["text_dim"] = job.embedder.encoder.dim if job.embedder else 0
    values["skipped"] = len(summary["skipped"])
    values["skipped_files"] = summary["skipped"][:_NAMED_SKIPS]
    return Manifest(**values)


def write_shard(
    job: Job, number: int, progress: Callable[[int], None] = lambda examples: None
) -> dict[str, Any]:
    """Writes a shard and its report; returns the report."""
    stats = Stats()
    items = verify_images(job.source.read(number), job.settings.rules)
    items = stats.usable(items, progress)
    file = job.shard_file(number)
    with full_disk(job.output):
        with appearing(file) as partial:
            if job.embedder:
                _write_records(partial, stats.embedded(items, job.embedder))
            else:
                webdataset.write_tar(partial, map(_tar_row, items))
            with open(partial, "rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        report = stats.report(file.name, sha256)
        write_text(job.report_file(number), _json(report))
    return report


def _write_records(path, items) -> None:
    from imagen_jax.data import records

    rows = (
        {
            "id": item.id,
            "image": item.image.data,
            "caption": item.caption.encode(),
            "text": text.data,
            "side": item.image.side,
        }
        for item, text in items
    )
    records.write_shard(path, rows)


def _tar_row(item) -> tuple[str, str, bytes, dict[str, str]]:
    extension = "png" if item.image.data.startswith(b"\x89PNG") else "jpg"
    values = {"caption": item.caption, "name": item.name}
    return f"{item.id:09d}", extension, item.image.data, values


def check_share(job: Job, used: int, skipped: list[dict], least: int = 0) -> None:
    """Raises `UserError` when too many examples cannot be used.

    Args:
      job: knows how many are too many.
      used: number of examples so far that can be used.
      skipped: those that cannot.
      least: examples that a share is judged by at least; 0 when all are seen.
    """
    source, limit = job.settings.source, job.settings.max_bad_share
    seen = used + len(skipped)
    if not seen and not least:
        raise UserError(f"{source!r} has no examples")
    if len(skipped) > limit * max(seen, least) or not (used or least):
        raise UserError(
            f"{len(skipped)} of {seen} examples of {source!r} cannot be used (see "
            f"--max_bad_share={limit:g}), first {skipped[0]['file']!r}: "
            f"{skipped[0]['reason']}"
        )


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives another name to write under; renames what was written to `path`.

    Several processes may do this to one path at once, with the same content.
    """
    # Under the same name a process would truncate what another is writing.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except FileNotFoundError:
        # Another process was first, and removed what it took for left over.
        if not path.exists():
            raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    with appearing(path) as partial:
        partial.write_text(text, "utf8")


@contextlib.contextmanager
def full_disk(folder: pathlib.Path) -> Iterator[None]:
    """Turns errors of a full disk into one that says what to do."""
    try:
        yield
    # TensorFlow has a class of its own for each error, and is not imported here.
    except Exception as error:  # noqa: BLE001
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if is_full or type(error).__name__ == "ResourceExhaustedError":
            raise UserError(
                f"the disk of {str(folder)!r} is full: make room and start the same "
                "command again, it continues with the shard that it was at"
            ) from None
        raise


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
