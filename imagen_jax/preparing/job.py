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
finished writes the last files, which are the same whoever writes them. So a job
that was killed continues when it is started again, with as many processes as one
likes.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from imagen_jax.data import manifest as manifests
from imagen_jax.errors import UserError
from imagen_jax.preparing import disk, webdataset
from imagen_jax.preparing.captions import Embedder
from imagen_jax.preparing.images import Rules
from imagen_jax.preparing.selection import Chosen, select
from imagen_jax.preparing.sources import Originals
from imagen_jax.preparing.tally import Tally, total

# Captions in one call of the encoder.
_CAPTIONS = 256
# A share is not judged by fewer examples before all are seen.
_LEAST_EXAMPLES = 1000
# Named in the manifest; the quarantine names all.
_NAMED_SKIPS = 100


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be written where.

    Attributes:
      folder: the output.
      source: what messages call the originals.
      originals: the source.
      rules: of its pictures.
      embedder: of its captions; None writes tars of pictures, without embeddings.
      max_bad_share: of the examples, that cannot be used; more stop the job.
    """

    folder: pathlib.Path
    source: str
    originals: Originals
    rules: Rules
    embedder: Embedder | None
    max_bad_share: float

    def file_name(self, number: int) -> str:
        """Of a shard's file."""
        if self.embedder:
            return f"records-{number:05d}.tfrecord"
        return f"{number:05d}.tar"

    def report(self, number: int) -> pathlib.Path:
        """The file that says what happened in a shard."""
        # By the tars as img2dataset names its own.
        kind = ".json" if self.embedder else "_stats.json"
        file = self.folder / self.file_name(number)
        return file.with_name(file.stem + kind)

    def finished(self, number: int) -> dict[str, Any] | None:
        """The report on a shard that is finished; else None."""
        try:
            report = json.loads(self.report(number).read_text("utf8"))
        except FileNotFoundError:
            return None
        whole = (self.folder / self.file_name(number)).is_file()
        return report if whole else None


def start(folder: pathlib.Path, asked: dict[str, Any]) -> manifests.Manifest | None:
    """Makes the folder of a job that was asked for `asked`, or returns to it.

    Returns:
      the manifest of a job that is finished already, and lacks no file.

    Raises:
      UserError: when the folder holds something else.
    """
    file = folder / manifests.JOB_FILE
    if folder.exists() and not folder.is_dir():
        raise not_ours(folder)
    with disk.full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            # Another process may be writing the same file.
            others = [path for path in folder.iterdir() if not disk.is_temporary(path)]
            if others and not file.exists():
                raise not_ours(folder)
            disk.write_text(file, _json(asked))
    check_same(folder, json.loads(file.read_text("utf8")), asked)
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


def check_same(
    output: pathlib.Path, old: dict[str, Any], asked: dict[str, Any]
) -> None:
    """Raises `UserError` that names what was asked for before and is not now."""
    flat = [{**job["settings"], **job, "settings": None} for job in (old, asked)]
    differs = [
        "other pictures or captions"
        if name == "source_sha256"
        else f"{name} {flat[0].get(name)!r}, not {value!r}"
        for name, value in flat[1].items()
        if flat[0].get(name) != value
    ]
    if differs:
        raise UserError(
            f"--output={str(output)!r} was prepared with {'; '.join(differs)}: give "
            "another name, or remove it"
        )


def run(
    job: Job,
    asked: dict[str, Any],
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[..., None] = lambda examples, resumed=False: None,
) -> manifests.Manifest | None:
    """Writes this process's shards that are not finished, then what comes last.

    Args:
      job: what to write.
      asked: as in `start`.
      process_index: of this process.
      process_count: between how many processes the shards are divided.
      progress: is called with numbers of examples that are done with, and `resumed`
        for those of an earlier run.

    Returns:
      the manifest; None while other processes have not finished their shards.

    Raises:
      UserError: when too many examples cannot be used, or the disk is full.
    """
    used, skipped = 0, []
    for number in range(process_index, job.originals.shards, process_count):
        report = job.finished(number)
        if report:
            progress(report["examples"] + len(report["skipped"]), resumed=True)
        else:
            report = write_shard(job, number, progress)
        used += report["examples"]
        skipped += report["skipped"]
        check_share(job, used, skipped, _LEAST_EXAMPLES)
    reports = []
    for number in range(job.originals.shards):
        reports.append(job.finished(number))
        if not reports[-1]:
            return None
    summary = total(reports, job.originals.problems)
    lines = (json.dumps(row, ensure_ascii=False) for row in summary["skipped"])
    with disk.full(job.folder):
        disk.write_text(
            job.folder / manifests.QUARANTINE_FILE,
            "".join(f"{line}\n" for line in lines),
        )
        check_share(job, summary["examples"], summary["skipped"])
        done = manifest(job, asked, summary)
        if job.embedder:
            from imagen_jax.preparing import tfds

            examples = [report["examples"] for report in reports]
            for name, text in tfds.info_files(done, examples).items():
                disk.write_text(job.folder / name, text)
        name = manifests.FILE_NAME if job.embedder else manifests.PICTURES_FILE
        disk.write_text(job.folder / name, manifests.to_json(done))
    # After it: another process that is about to write the same finds it written.
    disk.remove_temporary(job.folder)
    return done


def manifest(
    job: Job, asked: dict[str, Any], summary: dict[str, Any]
) -> manifests.Manifest:
    """The manifest of a job; `summary` is the `total` of its reports."""
    skipped = summary["skipped"]
    values = {name: value for name, value in asked.items() if name != "format"}
    rest = {"skipped": len(skipped), "skipped_files": skipped[:_NAMED_SKIPS]}
    dim = job.embedder.encoder.dim if job.embedder else 0
    return manifests.Manifest(text_dim=dim, **values | summary | rest)


def write_shard(
    job: Job, number: int, progress: Callable[[int], None] = lambda examples: None
) -> dict[str, Any]:
    """Writes a shard and its report; returns the report."""
    tally = Tally()
    items = tally.chosen(select(job.originals.read(number), job.rules), progress)
    file = job.folder / job.file_name(number)
    with disk.full(job.folder):
        with disk.appearing(file) as partial:
            if job.embedder:
                _write_records(partial, items, job.embedder, tally)
            else:
                webdataset.write_tar(partial, _tar_rows(items))
            with open(partial, "rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        report = tally.report(file.name, sha256)
        disk.write_text(job.report(number), _json(report))
    return report


def _write_records(path, items, embedder, tally) -> None:
    from imagen_jax.data import records as tasks

    def rows():
        for item, text in embedded(items, embedder, tally):
            yield {
                "id": item.id,
                "image": item.picture.data,
                "caption": item.caption.encode(),
                "text": text,
                "side": item.picture.side,
            }

    tasks.write_shard(path, rows())


def _tar_rows(items) -> Iterator[tuple]:
    for item in items:
        png = item.picture.data.startswith(b"\x89PNG")
        values = {"caption": item.caption, "name": item.name}
        yield f"{item.id:09d}", "png" if png else "jpg", item.picture.data, values


def embedded(
    items: Iterable[Chosen], embedder: Embedder, tally: Tally
) -> Iterator[tuple[Chosen, bytes]]:
    """Yields each item with the bytes of its caption's embedding."""
    items = iter(items)
    while chunk := list(itertools.islice(items, _CAPTIONS)):
        for item, text in zip(chunk, embedder.embed([i.caption for i in chunk])):
            tally.add_text(text)
            yield item, text.data


def check_share(job: Job, used: int, skipped: list[dict], least: int = 0) -> None:
    """Raises `UserError` when too many examples cannot be used.

    Args:
      job: knows how many are too many.
      used: examples so far that can be used.
      skipped: what cannot.
      least: examples by which a share is judged at least; 0 when all are seen.
    """
    seen = used + len(skipped)
    if not seen and not least:
        raise UserError(f"{job.source!r} has no examples")
    if len(skipped) > job.max_bad_share * max(seen, least) or not (used or least):
        raise UserError(
            f"{len(skipped)} of {seen} examples of {job.source!r} cannot be used (see "
            f"--max_bad_share={job.max_bad_share:g}), first {skipped[0]['file']!r}: "
            f"{skipped[0]['reason']}"
        )


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
