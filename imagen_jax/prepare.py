"""Turns captioned pictures into records for training.

python -m imagen_jax.prepare --source=folder:DIR --output=RECORDS --encoder=tiny

Verifies every picture, embeds every caption with the frozen text encoder, and writes
a folder of records, or with --output=FILE.npz one file that training reads without
TensorFlow. Killed, it continues when it is started again. Several processes share the
work with --process_index and --process_count. docs/prepare.md has the rest.
"""

import dataclasses
import math

import jax
import tqdm
from absl import flags

from imagen_jax import cli
from imagen_jax.data.manifest import QUARANTINE_FILE, Manifest
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.preparing import beam, npz
from imagen_jax.preparing import job as jobs
from imagen_jax.preparing.captions import Embedder
from imagen_jax.preparing.settings import NO_ENCODER, Settings
from imagen_jax.preparing.stats import estimate, format_bytes
from imagen_jax.text.encoders import load_encoder


def prepare(
    source: str, output: str, *, progress: bool = True, **settings
) -> Manifest | None:
    """Writes the records of `source` to `output`.

    Equal arguments and an equal source make equal bytes, however often the job was
    killed and however many processes it was divided among. What is there already is
    kept if it is the same, else refused.

    Args:
      source: one of `preparing.sources.FORMS`.
      output: a folder to be, or FILE.npz.
      progress: whether to show an estimate, a bar and a summary.
      **settings: the other fields of `preparing.settings.Settings`.

    Returns:
      the manifest; None when other processes have not finished.

    Raises:
      UserError: for bad settings, a source that is malformed or of which too much
        cannot be used, an output that holds something else, and a full disk.
    """
    asked = Settings(source, output, **settings)
    asked.check()
    embedder = None
    index, count = asked.process_index or 0, asked.process_count or 1
    if asked.encoder != NO_ENCODER:
        encoder = load_encoder(
            asked.encoder, asked.encoder_weights, asked.encoder_dtype
        )
        embedder = Embedder(encoder, asked.text_length, asked.embedding_dtype)
        if asked.process_count is None and not asked.is_npz:
            # Not for pictures alone, which need no accelerator.
            index, count = jax.process_index(), jax.process_count()
    job = jobs.open_job(asked, embedder)
    old = jobs.start(job)
    if old:
        if progress:
            print(f"already prepared: {old.examples} examples in {output}")
        return old
    if embedder and not asked.is_npz:
        # Before the bar, which its start would interrupt.
        start_tensorflow()
    if progress:
        print(estimate(job.source, asked.rules, embedder, job.output))
    total, shards = job.source.count, job.source.shards
    if total is not None:
        total = math.ceil(total * len(range(index, shards, count)) / shards)
    # A pipeline shows its own progress.
    hidden = not progress or bool(asked.runner)
    with tqdm.tqdm(total=total, unit=" examples", disable=hidden) as bar:
        if asked.is_npz:
            manifest = npz.write(job, bar.update)
        else:
            if asked.runner:
                todo = [n for n in range(shards) if not job.report(n)]
                beam.write_shards(asked, todo)
            manifest = jobs.run(job, index, count, bar.update)
    if progress:
        print(_summary(job, manifest))
    return manifest


def _summary(job: jobs.Job, manifest: Manifest | None) -> str:
    if not manifest:
        shards = job.source.shards
        there = sum(bool(job.report(number)) for number in range(shards))
        return (
            f"this process is done; {there} of {shards} shards are there. The process "
            "that finishes last writes the manifest; if one was killed, start it again"
        )
    n, error = manifest.examples, manifest.cosine_error
    lines = [f"prepared {n} examples in {job.output}"]
    if job.embedder:
        lines.append(
            f"text: {manifest.encoder}, {manifest.tokens_mean} tokens a caption, at "
            f"most {manifest.tokens_max}; {job.embedder.encoded} different captions "
            f"encoded; {format_bytes(manifest.text_bytes / n)} a caption, cosine error "
            f"{error['mean']:.2g}, at worst {error['worst']:.2g}"
        )
    lines.append(
        f"pictures: {format_bytes(manifest.image_bytes / n)} each, "
        f"{manifest.reencoded} of them reencoded"
    )
    if manifest.cut_captions:
        lines.append(f"cut: {manifest.cut_captions} captions were too long")
    if manifest.skipped:
        file = job.output / QUARANTINE_FILE
        where = "the manifest" if job.settings.is_npz else file
        lines.append(f"skipped: {manifest.skipped} examples, listed in {where}:")
        lines += [f"  {s['file']}: {s['reason']}" for s in manifest.skipped_files[:5]]
    return "\n".join(lines)


def define_flags() -> None:
    """Defines a flag for each of the `Settings`; main() reads them."""
    kinds = {str: flags.DEFINE_string, float: flags.DEFINE_float}
    for field in dataclasses.fields(Settings):
        required = field.default is dataclasses.MISSING
        define = kinds.get(field.type, flags.DEFINE_integer)
        define(field.name, None if required else field.default, field.metadata["help"])
        if required:
            flags.mark_flag_as_required(field.name)


def main() -> None:
    """Prepares what the flags ask for."""
    names = [field.name for field in dataclasses.fields(Settings)]
    prepare(**{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
