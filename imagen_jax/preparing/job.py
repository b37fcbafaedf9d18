"""`prepare` as a job: shards written one by one, by any number of processes.

The folder of a job holds prepare.json, what was asked for; of each finished shard its
file and a report on what happened in it; and at the end quarantine.jsonl (what could
not be used), files for tfds, and manifest.json, with which the job is finished. Each
file appears whole or not at all. A process writes the shards whose number modulo the
number of processes is its own; the one that finds all of them finished writes the last
files, which are the same whoever writes them. So a job that was killed continues when
it is started again, with any number of processes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from imagen_jax.data import manifest as manifests
from imagen_jax.data.manifest import Manifest
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError, did_you_mean, read_json
from imagen_jax.preparing import folder, parquet, sources, webdataset
from imagen_jax.preparing.captions import Embedded, Embedder
from imagen_jax.preparing.images import StoredImage
from imagen_jax.preparing.settings import NO_ENCODER, Settings
from imagen_jax.preparing.stats import Stats, total

# A share is not judged by fewer examples before all are seen.
_LEAST_EXAMPLES = 1000
# Captions in one call of the encoder.
_CAPTIONS = 256
# Skipped examples named in the manifest; the quarantine names all.
_NAMED_SKIPS = 100
_TEMPORARY = ".tmp"

Progress = Callable[[int], None]

_KINDS = ("folder", "webdataset", "parquet", "tfds", "shapes")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be written where."""

    settings: Settings
    source: sources.Source
    embedder: Embedder | None  # None writes tars of images, without embeddings

    @property
    def output(self) -> pathlib.Path:
        """The folder or file that is written."""
        return pathlib.Path(self.settings.output)

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

    def files(self, number: int) -> tuple[pathlib.Path, pathlib.Path]:
        """The file of a shard, and that of the report on it."""
        if self.embedder:
            names = f"records-{number:05d}.tfrecord", f"records-{number:05d}.json"
        else:
            # As img2dataset names them.
            names = f"{number:05d}.tar", f"{number:05d}_stats.json"
        return self.output / names[0], self.output / names[1]

    def report(self, number: int) -> dict[str, Any] | None:
        """The report on a shard that is finished; else None."""
        shard, report = self.files(number)
        if not (report.is_file() and shard.is_file()):
            return None
        return read_json(report, "a report of `prepare` on a shard (remove it)")


def open_source(
    name: str, image_size: int, seed: int, shard_examples: int
) -> sources.Source:
    """Opens the source called `name`, without opening an image.

    Args:
      name: one of `sources.FORMS`.
      image_size: pixels of a side of drawn scenes.
      seed: seed of the order of a folder and of drawn scenes.
      shard_examples: examples in a shard; not of tars, each of which is a shard.

    Raises:
      UserError: when there is no such source, or it is malformed.
    """
    kind, _, argument = name.partition(":")
    if kind not in _KINDS or not argument:
        hint = did_you_mean(kind, _KINDS)
        raise UserError(f"--source is {name!r}{hint}; it is {sources.FORMS}")
    if kind == "folder":
        return folder.open_folder(argument, seed, shard_examples)
    if kind == "webdataset":
        return webdataset.open_tars(argument)
    if kind == "parquet":
        return parquet.open_parquet(argument, shard_examples)
    if kind == "shapes":
        return sources.open_shapes(argument, image_size, seed, shard_examples)
    start_tensorflow()
    from imagen_jax.preparing import tfds

    return tfds.open_tfds(argument, shard_examples)


def open_job(settings: Settings, embedder: Embedder | None = None) -> Job:
    """Opens the source of a job; `UserError` when there is none, or it is malformed."""
    options = settings.image_size, settings.seed, settings.shard_examples
    return Job(settings, open_source(settings.source, *options), embedder)


def start(job: Job) -> Manifest | None:
    """Creates the folder of a job, or returns to it.

    Returns:
      the manifest of a job that is finished already, and lacks no file.

    Raises:
      UserError: when the output holds something else.
    """
    output, file = job.output, job.output / manifests.JOB_FILE
    if job.settings.is_npz or output.is_file():
        return _finished_npz(job) if output.exists() else None
    output.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        others = [path for path in output.iterdir() if path.suffix != _TEMPORARY]
        # Another process may have written it meanwhile.
        if others and not file.exists():
            raise _not_ours(output)
        write_text(file, _json(job.identity()))
    _check_same(job, read_json(file, "what a job of `prepare` was asked for"))
    for name in (manifests.FILE_NAME, manifests.PICTURES_FILE):
        if (output / name).is_file():
            old = manifests.from_values(read_json(output / name, "a manifest"), name)
            if all((output / shard["file"]).is_file() for shard in old.shards):
                return old
    return None


def _finished_npz(job: Job) -> Manifest:
    try:
        old = manifests.read_manifest(job.output)
    except UserError:
        raise _not_ours(job.output) from None
    _check_same(job, {"format": manifests.FORMAT} | dataclasses.asdict(old))
    return old


def _not_ours(output: pathlib.Path) -> UserError:
    return UserError(
        f"--output={str(output)!r} exists and was not written by this version of "
        "`prepare`: give another name, or remove it"
    )


def _check_same(job: Job, old: dict[str, Any]) -> None:
    """Raises `UserError` if the output has another identity, and names what differs."""
    new = job.identity()
    before, now = ({**values.pop("settings", {}), **values} for values in (old, new))
    differs = [
        f"{name} {before.get(name)!r}, not {value!r}"
        for name, value in now.items()
        if name != "source_sha256" and before.get(name) != value
    ]
    if before.get("source_sha256") != now["source_sha256"]:
        differs.append("other pictures or captions")
    if differs:
        raise UserError(
            f"--output={job.settings.output!r} was prepared with "
            f"{'; '.join(differs)}: give another name, or remove it"
        )


def run(
    job: Job, process_index: int, process_count: int, progress: Progress
) -> Manifest | None:
    """Writes one process's shards that are not finished, then what comes last.

    Returns:
      the manifest; None while other processes have not finished their shards.

    Raises:
      UserError: when too many examples cannot be used, or the disk is full.
    """
    used, skipped = 0, []
    for number in range(process_index, job.source.shards, process_count):
        report = job.report(number)
        if report:
            progress(report["examples"] + len(report["skipped"]))
        else:
            report = write_shard(job, number, progress)
        used += report["examples"]
        skipped += report["skipped"]
        check_share(job, used, skipped, _LEAST_EXAMPLES)
    shards = range(job.source.shards)
    reports = list(itertools.takewhile(bool, map(job.report, shards)))
    return _finish(job, reports) if len(reports) == len(shards) else None


def _finish(job: Job, reports: list[dict[str, Any]]) -> Manifest:
    """Writes what comes after all shards."""
    folder = job.output
    summary = total(reports, job.source.problems)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in summary["skipped"])
    write_text(folder / manifests.QUARANTINE_FILE, "".join(lines))
    check_share(job, summary["examples"], summary["skipped"])
    manifest = make_manifest(job, summary)
    if job.embedder:
        from imagen_jax.preparing import tfds

        examples = [report["examples"] for report in reports]
        for name, text in tfds.info_files(manifest, examples).items():
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
    job: Job, number: int, progress: Progress = lambda examples: None
) -> dict[str, Any]:
    """Writes a shard and its report; returns the report."""
    stats = Stats()
    shard, report_file = job.files(number)
    write = _write_records if job.embedder else webdataset.write_tar
    with appearing(shard) as partial:
        write(partial, usable(job, number, stats, progress))
        with open(partial, "rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    report = stats.report(shard.name, sha256)
    write_text(report_file, _json(report))
    return report


def usable(
    job: Job, number: int, stats: Stats, progress: Progress
) -> Iterator[tuple[sources.Example, StoredImage, Embedded | None]]:
    """The examples of a shard that can be used, with their images and embeddings.

    All examples are counted in `stats`, and told to `progress`.
    """

    def verified():
        items = job.source.read(number)
        for item in sources.verify_images(items, job.settings.rules):
            progress(1)
            if isinstance(item, sources.Problem):
                stats.skip(item)
            else:
                yield item

    items = verified()
    while chunk := list(itertools.islice(items, _CAPTIONS)):
        captions = [example.caption for example, _ in chunk]
        texts = job.embedder.embed(captions) if job.embedder else [None] * len(chunk)
        for (example, image), text in zip(chunk, texts):
            stats.add(image, text)
            yield example, image, text


def _write_records(path: pathlib.Path, rows: Iterable) -> None:
    # Here, so that images are prepared without TensorFlow.
    from imagen_jax.data import records

    fields = (
        {
            "id": example.id,
            "image": image.data,
            "caption": example.caption.encode(),
            "text": text.data,
            "side": image.side,
        }
        for example, image, text in rows
    )
    records.write_shard(path, fields)


def check_share(job: Job, used: int, skipped: list[dict], least: int = 0) -> None:
    """Raises `UserError` when too many examples cannot be used.

    Before all are seen, the skipped are a share of no fewer than `least` examples.
    """
    source, limit = job.settings.source, job.settings.max_bad_share
    seen = used + len(skipped)
    if not (seen or least):
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

    Raises:
      UserError: when the disk is full.
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
    # TensorFlow has a class of its own for each error, and is not imported here.
    except Exception as error:  # noqa: BLE001
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if is_full or type(error).__name__ == "ResourceExhaustedError":
            raise UserError(
                f"the disk of {str(path.parent)!r} is full: make room and start the "
                "same command again, it continues with the shard that it was at"
            ) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    with appearing(path) as partial:
        partial.write_text(text, "utf8")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
