"""`prepare` as a job: shards written one by one, by any number of processes.

Its folder holds prepare.json, what was asked for; of each finished shard its file and a
report; and at the end quarantine.jsonl (what could not be used), files for tfds, and
the manifest. Process i of n writes the shards i, i + n, ...; whichever finds all of
them finished writes the last files. So a job that was killed continues when it is
started again, with any number of processes.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from imagen_jax.data import manifest as manifests
from imagen_jax.data import memory, start_tensorflow
from imagen_jax.data.manifest import Manifest
from imagen_jax.errors import UserError, needing_room
from imagen_jax.files import TEMPORARY, appearing, read_json, write_text
from imagen_jax.preparing import folder, parquet, sources, webdataset
from imagen_jax.preparing.images import StoredImage, middle_square
from imagen_jax.preparing.scores import Scores
from imagen_jax.preparing.settings import DRAWN, FORMS, NO_ENCODER, Settings
from imagen_jax.preparing.stats import Stats, in_words, total
from imagen_jax.text import embeddings
from imagen_jax.text.embeddings import Embedded, Embedder

# The share of unusable examples is not judged by fewer, before all are seen.
_LEAST_EXAMPLES = 1000
# Examples that are embedded in one call of the encoder.
_CHUNK = 256
# Skipped examples named in the manifest; the quarantine names all.
_NAMED_SKIPS = 100
# The null text has no tokens (`batch.Cond`).
_NULL_TEXT = Embedded(b"", 0, False, np.zeros(0))


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be written where."""

    settings: Settings
    source: sources.Source
    embedder: Embedder | None  # None writes tars of images, without embeddings
    scores: Scores = Scores()
    # Told how many more examples have been dealt with.
    progress: Callable[[int], object] = lambda examples: None

    @property
    def output(self) -> pathlib.Path:
        """The folder or file that is written."""
        return pathlib.Path(self.settings.output)

    def items(self) -> Iterator[sources.Example | sources.Problem | sources.Rest]:
        """The source, shard by shard."""
        shards = map(self.source.read, range(self.source.shards))
        return itertools.chain.from_iterable(shards)

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the output; kept in prepare.json."""
        embedder, sha256 = self.embedder, self.source.sha256
        if self.scores.identity:
            sha256 = sources.sha256_of([sha256, self.scores.identity])
        return {
            "format": manifests.FORMAT,
            "settings": self.settings.recorded(),
            "source_sha256": sha256,
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


def open_source(settings: Settings) -> sources.Source:
    """Opens the source of a job, without opening an image."""
    kind, _, argument = settings.source.partition(":")
    if not argument or kind not in _OPENERS:
        raise UserError(f"--source is {settings.source!r}; it is {FORMS}")
    return _OPENERS[kind](argument, settings)


def _open_tfds(argument: str, settings: Settings) -> sources.Source:
    start_tensorflow()
    from imagen_jax.preparing import tfds

    return tfds.open_tfds(argument, settings)


_OPENERS = {
    "folder": folder.open_folder,
    "coco": folder.open_coco,
    "webdataset": webdataset.open_tars,
    "parquet": parquet.open_parquet,
    "hf": parquet.open_huggingface,
    "tfds": _open_tfds,
    "shapes": sources.open_drawn,
    "wordings": sources.open_drawn,
}


def start(job: Job) -> Manifest | None:
    """Creates or enters a job's folder; returns the manifest of finished records."""
    output, asked = job.output, job.output / manifests.JOB_FILE
    old = None
    with contextlib.suppress(UserError):
        old = manifests.read_manifest(output)
    if old:
        _check_same(job, {"format": manifests.FORMAT} | dataclasses.asdict(old))
        return old
    try:
        alone = job.settings.is_npz or output.is_file()
        (output.parent if alone else output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={str(output)!r} cannot be made: {error.strerror}"
        ) from None
    if alone:
        is_other = output.exists()
    else:
        files = [path for path in output.iterdir() if path.suffix != TEMPORARY]
        is_other = files and not asked.exists()
    if is_other:
        raise UserError(
            f"--output={str(output)!r} was not written by `prepare`: give another name"
        )
    if not job.settings.is_npz:
        if not asked.exists():
            write_text(asked, _json(job.identity()))
        _check_same(job, read_json(asked, "what a job of `prepare` was asked for"))
    return None


def _check_same(job: Job, old: dict[str, Any]) -> None:
    """Raises `UserError` if the output has another identity, and names what differs."""
    new = job.identity()
    # What older versions did not have to be told is as if left at its default.
    old["settings"] = Settings("", "").recorded() | old.get("settings", {})
    before, now = ({**values.pop("settings"), **values} for values in (old, new))
    differs = [
        "other pictures or captions, or other scores"
        if name == "source_sha256"
        else f"{name} {before.get(name)!r}, not {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differs:
        raise UserError(
            f"--output={job.settings.output!r} was prepared with {'; '.join(differs)}: "
            "give another name, or remove it"
        )


def run(job: Job, process_index: int, process_count: int) -> Manifest | None:
    """Writes one process's shards that are not finished, then what comes last.

    Returns:
      the manifest; None while other processes have not finished their shards.
    """
    if job.settings.is_npz:
        return _write_npz(job)
    used, skipped = 0, []
    for number in range(process_index, job.source.shards, process_count):
        report = job.report(number)
        if report:
            job.progress(report["examples"] + len(report["skipped"]))
        else:
            report = write_shard(job, number)
        used += report["examples"]
        skipped += report["skipped"]
        _check_share(job, used, skipped, least=_LEAST_EXAMPLES)
    _check_unchanged(job)
    shards = range(job.source.shards)
    reports = list(itertools.takewhile(bool, map(job.report, shards)))
    return _finish(job, reports) if len(reports) == len(shards) else None


def _check_unchanged(job: Job) -> None:
    """Raises `UserError` if the source is not what it was when this process opened it.

    Then no shard counts as finished any more.
    """
    try:
        now = open_source(job.settings)
    except (OSError, UserError):
        now = None  # no source at all
    if now and (now.sha256, now.times) == (job.source.sha256, job.source.times):
        return
    reports = [job.files(number)[1] for number in range(job.source.shards)]
    for name in (manifests.FILE_NAME, manifests.PICTURES_FILE, *reports):
        if not job.settings.is_npz:
            (job.output / name).unlink(missing_ok=True)
    raise UserError(
        f"{job.settings.source!r} changed while it was read, so pictures may have got "
        f"captions of others: remove --output={job.settings.output!r}, and start again "
        "when nothing writes to the source"
    )


def _finish(job: Job, reports: list[dict[str, Any]]) -> Manifest:
    summary = _sum_up(job, reports)
    manifest = _make_manifest(job, summary)
    if job.embedder:
        from imagen_jax.preparing import tfds

        with needing_room(job.output):
            tfds.write_info(job.output, manifest, [r["examples"] for r in reports])
    name = manifests.FILE_NAME if job.embedder else manifests.PICTURES_FILE
    write_text(job.output / name, manifests.to_json(manifest))
    # What killed processes left. After the manifest: another process that is about to
    # write the same file finds it written.
    for path in job.output.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
    return manifest


def _sum_up(job: Job, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums up the reports, and what is in no shard; `UserError` if too much is bad."""
    beside = Stats()
    for problem in job.source.problems:
        beside.skip(problem)
    beside.pass_over(job.source.rest)
    summary = total([beside.report(""), *reports])
    if not job.settings.is_npz:
        rows = (json.dumps(row, ensure_ascii=False) for row in summary["skipped"])
        quarantine = job.output / manifests.QUARANTINE_FILE
        write_text(quarantine, "".join(f"{row}\n" for row in rows))
    _check_share(job, summary["examples"], summary["skipped"], summary["account"])
    return summary


def _make_manifest(job: Job, summary: dict[str, Any]) -> Manifest:
    values = job.identity() | summary
    del values["format"]
    values["text_dim"] = job.embedder.encoder.dim if job.embedder else 0
    values["skipped"] = len(summary["skipped"])
    values["skipped_files"] = summary["skipped"][:_NAMED_SKIPS]
    return Manifest(**values)


def _write_npz(job: Job) -> Manifest:
    """Writes the file for host memory, at once: this does not resume."""
    size, embedder = job.settings.image_size, job.embedder
    stats, rows = Stats(), []
    for example, image, text in usable(job, job.items(), stats):
        pixels = middle_square(image.data, size)
        rows.append((example, pixels, text.data))
    summary = _sum_up(job, [stats.report("arrays")])
    _check_unchanged(job)
    examples, images, text = zip(*rows)
    row_bytes = embeddings.row_bytes(embedder.encoder.dim, embedder.dtype)
    ids, captions = zip(*((example.id, example.caption) for example in examples))
    scores = [list(example.scores.values()) for example in examples]
    arrays = memory.arrays(images, text, ids, row_bytes, scores)
    sides = {str(size): len(ids)}
    summary["shards"][0] |= {"sha256": memory.sha256(arrays), "sides": sides}
    manifest = _make_manifest(job, summary)
    with appearing(job.output) as partial:
        memory.write(partial, arrays, captions, manifest)
    return manifest


def write_shard(job: Job, number: int) -> dict[str, Any]:
    """Writes a shard and its report; returns the report."""
    stats = Stats()
    shard, report_file = job.files(number)
    write = _write_records if job.embedder else webdataset.write_tar
    with appearing(shard) as partial:
        write(partial, usable(job, job.source.read(number), stats))
        with open(partial, "rb") as written:
            file = {"sha256": hashlib.file_digest(written, "sha256").hexdigest()}
            file["bytes"] = written.tell()
            written.seek(0)
            file["head_sha256"] = manifests.head_sha256(written)
    report = stats.report(shard.name) | file
    write_text(report_file, _json(report))
    return report


def usable(
    job: Job, items: Iterable, stats: Stats
) -> Iterator[tuple[sources.Example, StoredImage, Embedded | None]]:
    """The examples among `items` that can be used, with their images and embeddings.

    All are counted in `stats`, and so is the rest.
    """
    rules, no_captions = job.settings.rules, job.settings.no_captions
    # Pictures without embeddings are read, and so verified, once more. Drawn scenes in
    # a .npz file need no TensorFlow.
    drawn = job.settings.is_npz and job.settings.source.startswith(DRAWN)
    if job.embedder and not drawn:
        start_tensorflow()
        from imagen_jax.data import preprocess

        rules["sides"] = preprocess.sides
    verified = sources.verify_images(items, **rules)
    while chunk := list(itertools.islice(verified, _CHUNK)):
        good = []
        for item in chunk:
            if isinstance(item, sources.Rest):
                stats.pass_over(item)
                continue
            job.progress(1)
            if isinstance(item, sources.Problem):
                stats.skip(item)
            else:
                example, image = item
                scores = job.scores.of(example, image)
                good.append((dataclasses.replace(example, scores=scores), image))
        captions = [example.caption for example, _ in good]
        texts = [_NULL_TEXT if job.embedder else None] * len(good)
        if job.embedder and not no_captions:
            texts = job.embedder.embed(captions)
        for (example, image), text in zip(good, texts):
            stats.add(example, image, text)
            yield example, image, text


def _write_records(path: pathlib.Path, rows: Iterable) -> None:
    # Here, so that images are prepared without TensorFlow.
    start_tensorflow()
    from imagen_jax.data import records

    fields = (
        {
            "id": example.id,
            "image": image.data,
            "caption": example.caption.encode(),
            "text": text.data,
            "side": image.side,
        }
        | {f"scores/{name}": value for name, value in example.scores.items()}
        for example, image, text in rows
    )
    records.write_shard(path, fields)


def _check_share(
    job: Job,
    used: int,
    skipped: list[dict],
    account: Mapping[str, int] | None = None,
    least: int = 0,
) -> None:
    """Raises `UserError` when too many of at least `least` examples cannot be used."""
    source, limit = job.settings.source, job.settings.max_bad_share
    seen = used + len(skipped)
    # What is taken, for those who have something else.
    takes = "" if used or not job.source.takes else f"; {job.source.takes}"
    if not (seen or least):
        there = in_words(account or {})
        but = f", but {there}" if there else ""
        raise UserError(f"{source!r} has no examples{but}{takes}")
    if len(skipped) > limit * max(seen, least) or not (used or least):
        _check_unchanged(job)
        first = "first {file!r}: {reason}".format(**skipped[0])
        raise UserError(
            f"{len(skipped)} of {seen} examples of {source!r} cannot be used "
            f"(--max_bad_share={limit:g}), {first}{takes}"
        )


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
