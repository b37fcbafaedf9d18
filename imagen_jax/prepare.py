"""Turns captioned pictures into records for training.

python -m imagen_jax.prepare --source=folder:DIR --output=RECORDS --encoder=tiny

python -m imagen_jax.prepare --report=RECORDS

Verifies every picture, embeds every caption with the frozen text encoder, and writes
a folder of records, or with --output=FILE.npz one file that training reads without
TensorFlow. Killed, it continues when it is started again. Several processes share the
work with --process_index and --process_count. --report, alone, writes a data card of
records: a page and JSON. docs/prepare.md has the rest.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import tqdm
from absl import flags

from imagen_jax import cli
from imagen_jax.data.manifest import Manifest
from imagen_jax.errors import printable
from imagen_jax.preparing import beam
from imagen_jax.preparing import job as jobs
from imagen_jax.preparing.card import write_card
from imagen_jax.preparing.scores import check_match, open_scores
from imagen_jax.preparing.settings import NO_ENCODER, Settings
from imagen_jax.preparing.stats import Stats, in_words
from imagen_jax.text.embeddings import Embedder
from imagen_jax.text.encoders import load_encoder

# Examples by which a job is judged before it begins.
_FIRST = 64
_size = functools.partial(tqdm.tqdm.format_sizeof, suffix="B")


def prepare(
    source: str, output: str, *, progress: bool = True, **settings
) -> Manifest | None:
    """Writes the records of `source` to `output`; `settings` are other `Settings`.

    Equal arguments and an equal source make equal bytes, however often the job was
    killed and however many processes shared it. What is there already is kept if it is
    the same, else refused. `progress` shows an estimate, a bar and a summary.

    Returns:
      the manifest; None when other processes have not finished.
    """
    asked = Settings(source, output, **settings)
    asked.check()
    index, count, embedder = asked.process_index, asked.process_count, None
    opened = jobs.open_source(asked)  # first, as an encoder takes minutes to load
    scores = open_scores(asked.scores)
    if asked.encoder != NO_ENCODER:
        encoder = load_encoder(
            asked.encoder, asked.encoder_weights, asked.encoder_dtype
        )
        embedder = Embedder(encoder, asked.text_length, asked.embedding_dtype)
    if count is None:
        # Pictures alone need no accelerator.
        several = embedder and not asked.is_npz
        index, count = (jax.process_index(), jax.process_count()) if several else (0, 1)
    job = jobs.Job(asked, opened, embedder, scores)
    old = jobs.start(job)
    if old:
        if progress:
            print(printable(f"already prepared: {old.examples} examples in {output}"))
        return old
    check_match(scores, itertools.islice(job.items(), _FIRST))
    if progress:
        print(_estimate(job))
    total = job.source.count and job.source.count // count
    with tqdm.tqdm(total=total, unit=" examples", disable=not progress) as bar:
        job = dataclasses.replace(job, progress=bar.update)
        if asked.runner:
            beam.write_shards_with_beam(job)
        manifest = jobs.run(job, index, count)
    if progress:
        print(_summary(job, manifest) if manifest else "done here; others are not")
    return manifest


def _estimate(job: jobs.Job) -> str:
    """What is wrong with its scores, and a job's size, judged by its first examples."""
    first, count = itertools.islice(job.items(), _FIRST), job.source.count
    sizes = [
        len(image.data) + (len(text.data) if text else 0)
        for _, image, text in jobs.usable(job, first, Stats())
    ]
    each = sum(sizes) / max(len(sizes), 1)
    whole = f", {_size(count * each)} for {count:,}" if count else ""
    lines = [*job.scores.faults, f"estimated: {_size(each)} an example{whole}"]
    return "\n".join(map(printable, lines))


def _summary(job: jobs.Job, done: Manifest) -> str:
    lines = [
        f"prepared {done.examples} examples in {job.output}: "
        f"{_size(done.image_bytes)} of pictures ({done.reencoded} reencoded), "
        f"{_size(done.text_bytes)} of captions ({done.cut_captions} cut, "
        f"cosine error {done.cosine_error['mean']:.2g}); {done.skipped} skipped"
    ]
    if done.account:
        used, quarantined = done.account["used"], done.account["quarantined"]
        kind = done.settings["source"].partition(":")[0]
        parts = {"folder": "files", "webdataset": "members", "coco": "pictures"}
        kinds = in_words(done.account)
        lines.append(
            f"of {done.holds:,} {parts.get(kind, 'rows')} {used:,} are used, "
            f"{quarantined:,} quarantined and {done.holds - used - quarantined:,} "
            f"passed over{f' ({kinds})' if kinds else ''}"
        )
    lines += [f"  {s['file']}: {s['reason']}" for s in done.skipped_files[:5]]
    for name, unknown in done.scores.items():
        if unknown:
            lines.append(f"{unknown:,} of {done.examples:,} have no score {name!r}")
    if (rows := len(job.scores.pictures)) > done.scored:
        lines.append(f"{rows - done.scored:,} of {rows:,} scored pictures are not here")
    return "\n".join(map(printable, lines))


def define_flags() -> None:
    """Defines a flag for each of the `Settings`; main() reads them."""
    flags.DEFINE_string("report", None, "records whose data card is written; alone")
    kinds = {str: flags.DEFINE_string, float: flags.DEFINE_float}
    kinds |= {bool: flags.DEFINE_bool, Any: flags.DEFINE_string}
    for field in dataclasses.fields(Settings):
        define = kinds.get(field.type, flags.DEFINE_integer)
        default = None if field.default is dataclasses.MISSING else field.default
        define(field.name, default, field.metadata["help"])
    flags.register_multi_flags_validator(
        ["source", "output", "report"],
        lambda values: (
            {name for name, value in values.items() if value is not None}
            in ({"source", "output"}, {"report"})
        ),
        message="give --source and --output, or --report alone",
    )


def main() -> None:
    """Prepares what the flags ask for, or writes a data card."""
    if flags.FLAGS.report is not None:
        print(f"the data card is {write_card(flags.FLAGS.report)}")
        return
    names = [field.name for field in dataclasses.fields(Settings)]
    prepare(**{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
