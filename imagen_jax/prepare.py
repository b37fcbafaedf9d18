"""Turns captioned pictures into records for training.

python -m imagen_jax.prepare --source=folder:DIR --output=RECORDS --encoder=tiny

Verifies every picture, embeds every caption with the frozen text encoder, and writes
a folder of records, or with --output=FILE.npz one file that training reads without
TensorFlow. Killed, it continues when it is started again. Several processes share the
work with --process_index and --process_count. docs/prepare.md has the rest.
"""

import dataclasses
import inspect
import math
import pathlib
from typing import Any

import jax
import tqdm
from absl import flags

from imagen_jax import cli
from imagen_jax.data import manifest as manifests
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError
from imagen_jax.preparing import beam, estimate
from imagen_jax.preparing import job as jobs
from imagen_jax.preparing import npz as memory_file
from imagen_jax.preparing import sources as originals
from imagen_jax.preparing.captions import Embedder
from imagen_jax.preparing.images import Rules
from imagen_jax.text import embeddings
from imagen_jax.text import encoders as text

# In place of an encoder: tars of pictures, whose captions are embedded later.
_NO_ENCODER = "none"


def prepare(
    source: str,
    output: str,
    encoder: str = "tiny",
    encoder_weights: str = "",
    encoder_dtype: str = "",
    text_length: int = 128,
    embedding_dtype: str = "bfloat16",
    image_size: int = 64,
    min_side: int = 1,
    max_aspect: float = 0.0,
    stored_size: int = 0,
    shard_examples: int = 1000,
    seed: int = 0,
    max_bad_share: float = 0.5,
    process_index: int | None = None,
    process_count: int | None = None,
    runner: str = "",
    runner_options: str = "",
    progress: bool = True,
) -> manifests.Manifest | None:
    """Writes the records of `source` to `output`.

    Equal arguments and an equal source make equal bytes, however often the job was
    killed and among however many processes it was divided. What is there already is
    kept if it is the same, else refused.

    Args:
      source: one of `originals.FORMS`.
      output: a folder to be, or FILE.npz.
      encoder: name of the text encoder; "none" writes tars of pictures, from which
        records are prepared with --source=webdataset.
      encoder_weights: its weights, for encoders that have none built in.
      encoder_dtype: "bfloat16" (default) or "float32", of a T5's computation.
      text_length: tokens of a caption that are kept.
      embedding_dtype: in which embeddings are stored, "bfloat16" or "int8".
      image_size: pixels of a side, of drawn scenes and of pictures in a .npz file.
      min_side: pixels that the shorter side of a picture has at least.
      max_aspect: how many times as long as its shorter side a picture is at most; 0
        is no limit.
      stored_size: pixels to which the shorter side is reduced; 0 keeps pictures as
        they are.
      shard_examples: examples in one file of records, where the source does not
        decide it.
      seed: of the order of a folder's pictures and of drawn scenes.
      max_bad_share: of the examples, that cannot be used; more stop the job.
      process_index: of this process; None is JAX's.
      process_count: that share the work; None is JAX's.
      runner: of Apache Beam; for `encoder` "none" only.
      runner_options: of that runner, as on a command line.
      progress: whether to show an estimate, a bar and a summary.

    Returns:
      the manifest; None when other processes have not finished.

    Raises:
      UserError: for bad arguments, a source that is not as it must be or of which too
        much cannot be used, an output that holds something else, and a full disk.
    """
    rules = Rules(min_side, max_aspect, stored_size)
    settings = {
        "source": source,
        "text_length": text_length,
        "image_size": image_size,
        "shard_examples": shard_examples,
        "seed": seed,
    } | dataclasses.asdict(rules)
    _check_numbers(settings, max_bad_share)
    embeddings.check_dtype(embedding_dtype)
    path = pathlib.Path(output)
    embedder = None
    if encoder != _NO_ENCODER:
        loaded = text.load_encoder(encoder, encoder_weights, encoder_dtype)
        embedder = Embedder(loaded, text_length, embedding_dtype)
    index, count = _processes(process_index, process_count, embedder)
    _check_ways(output, embedder, count, runner)
    if path.suffix == ".npz" and 0 < stored_size < image_size:
        raise UserError(
            f"--stored_size is {stored_size}, less than --image_size={image_size}, "
            "the pictures' size in a .npz file: leave it out"
        )
    arguments = (source, image_size, seed, shard_examples)
    work = jobs.Job(
        path,
        source,
        originals.open_originals(*arguments),
        rules,
        embedder,
        max_bad_share,
    )
    asked = {
        "format": manifests.FORMAT,
        "settings": settings,
        "source_sha256": work.originals.sha256,
        "encoder": embedder.encoder.identity if embedder else _NO_ENCODER,
        "embedding_dtype": embedding_dtype if embedder else _NO_ENCODER,
    }
    npz = path.suffix == ".npz"
    old = _finished(path, asked) if npz else jobs.start(path, asked)
    if old:
        if progress:
            print(f"already prepared: {old.examples} examples in {output}")
        return old
    if embedder and not npz:
        # Before the bar, which its start would interrupt.
        start_tensorflow()
    # A pipeline shows its own progress.
    share = _Progress(work, index, count, progress, bar=progress and not runner)
    if npz:
        return share.finish(memory_file.write(work, asked, share.update))
    if runner:
        numbers = [n for n in range(work.originals.shards) if not work.finished(n)]
        open_job = (output, *arguments, *dataclasses.astuple(rules), max_bad_share)
        beam.write_shards(_open_pictures, open_job, numbers, runner, runner_options)
    return share.finish(jobs.run(work, asked, index, count, share.update))


def _check_numbers(settings: dict[str, Any], max_bad_share: float) -> None:
    for name in ("text_length", "image_size", "shard_examples", "min_side"):
        if settings[name] < 1:
            raise UserError(f"--{name} is {settings[name]}; it must be above zero")
    for name in ("seed", "stored_size", "max_aspect"):
        if settings[name] < 0:
            raise UserError(f"--{name} is {settings[name]}; it must not be negative")
    if 0 < settings["max_aspect"] < 1:
        raise UserError(
            f"--max_aspect is {settings['max_aspect']}; the longer side is at least "
            "as long as the shorter: give 1 or more, or 0 for no limit"
        )
    if 0 < settings["stored_size"] < settings["min_side"]:
        raise UserError(
            f"--stored_size is {settings['stored_size']}, less than "
            f"--min_side={settings['min_side']}"
        )
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"--max_bad_share is {max_bad_share:g}; give 0 to 1")


def _check_ways(output: str, embedder: Embedder | None, count: int, runner: str):
    if not output:
        raise UserError("--output is empty: give a folder to be, or FILE.npz")
    if "://" in output:
        raise UserError(
            f"--output is {output!r}: mount the bucket (gcsfuse, s3fs) and give the "
            "folder"
        )
    if output.endswith(".npz") and (count > 1 or not embedder):
        raise UserError(
            f"--output={output!r} is written by one process and has embeddings: give "
            "a folder for several processes or --encoder=none"
        )
    if runner and (embedder or count > 1):
        raise UserError(
            f"--runner={runner} prepares pictures only, by itself: give --encoder="
            f"{_NO_ENCODER} and no --process_count, then embed the captions with "
            "--source=webdataset:OUTPUT/*.tar"
        )


def _processes(
    index: int | None, count: int | None, embedder: Embedder | None
) -> tuple[int, int]:
    if (index is None) != (count is None):
        raise UserError("--process_index and --process_count go together: give both")
    if count is None:
        # Pictures need no accelerator, so none is started for them.
        return (jax.process_index(), jax.process_count()) if embedder else (0, 1)
    if not 0 <= index < count:
        raise UserError(
            f"--process_index is {index}; with --process_count={count} it is one of "
            f"0 to {count - 1}"
        )
    return index, count


def _open_pictures(
    output, source, image_size, seed, shard_examples, *rules_and_share
) -> jobs.Job:
    # For the workers of a pipeline.
    *rules, max_bad_share = rules_and_share
    opened = originals.open_originals(source, image_size, seed, shard_examples)
    return jobs.Job(
        pathlib.Path(output), source, opened, Rules(*rules), None, max_bad_share
    )


def _finished(path: pathlib.Path, asked: dict[str, Any]) -> manifests.Manifest | None:
    """The manifest of a .npz file if it is what would be written; None if none is."""
    if not path.exists():
        return None
    try:
        old = manifests.read_manifest(path)
    except UserError:
        raise jobs.not_ours(path) from None
    jobs.check_same(path, dataclasses.asdict(old) | {"format": asked["format"]}, asked)
    return old


class _Progress:
    """What a person sees of a job."""

    def __init__(self, work: jobs.Job, index: int, count: int, shown: bool, bar: bool):
        self._work, self._shown = work, shown
        total = work.originals.count
        own = len(range(index, work.originals.shards, count))
        if total is not None:
            total = math.ceil(total * own / work.originals.shards)
        if shown and (expected := estimate.estimate(work)):
            print(expected)
        self._bar = tqdm.tqdm(total=total, unit=" examples", disable=not bar)

    def update(self, examples: int, resumed: bool = False) -> None:
        """Moves the bar; what an earlier run has done does not count as speed."""
        if resumed and not self._bar.disable:
            self._bar.initial += examples
        self._bar.update(examples)

    def finish(self, manifest: manifests.Manifest | None):
        """Ends the bar, prints a summary; returns `manifest`."""
        self._bar.close()
        if self._shown:
            print(self._summary(manifest))
        return manifest

    def _summary(self, manifest) -> str:
        work = self._work
        if not manifest:
            there = sum(bool(work.finished(k)) for k in range(work.originals.shards))
            return (
                f"this process is done; {there} of {work.originals.shards} shards are "
                "there. The process that finishes last writes the manifest; if one "
                "was killed, start it again"
            )
        n = manifest.examples
        lines = [f"prepared {n} examples in {work.folder}"]
        if work.embedder:
            lines.append(
                f"text: {manifest.encoder}, {manifest.tokens_mean} tokens a caption, "
                f"at most {manifest.tokens_max}; {work.embedder.encoded} different "
                f"captions encoded; {estimate.size(manifest.text_bytes / n)} a "
                f"caption, cosine error {manifest.cosine_error['mean']:.2g}, at worst "
                f"{manifest.cosine_error['worst']:.2g}"
            )
        lines.append(
            f"pictures: {estimate.size(manifest.image_bytes / n)} each, "
            f"{manifest.reencoded} of them made anew"
        )
        if manifest.cut_captions:
            lines.append(f"cut: {manifest.cut_captions} captions were too long")
        if manifest.skipped:
            file = work.folder / manifests.QUARANTINE_FILE
            where = file if work.folder.is_dir() else "the manifest"
            lines.append(f"skipped: {manifest.skipped} examples, listed in {where}:")
            lines += [
                f"  {s['file']}: {s['reason']}" for s in manifest.skipped_files[:5]
            ]
        return "\n".join(lines)


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("source", None, originals.FORMS)
    flags.DEFINE_string("output", None, "a folder to be, or FILE.npz")
    flags.DEFINE_string(
        "encoder",
        "tiny",
        "the frozen text encoder: tiny, t5_1_1_SIZE, t5_1_0_SIZE, hf:NAME_OR_PATH or "
        "t5x:CHECKPOINT (docs/text_encoders.md); none: pictures without embeddings",
    )
    flags.DEFINE_string("encoder_weights", "", "its weights, if it has none built in")
    flags.DEFINE_string(
        "encoder_dtype", "", "bfloat16 (default) or float32, of a T5's computation"
    )
    flags.DEFINE_integer("text_length", 128, "tokens of a caption that are kept")
    flags.DEFINE_string("embedding_dtype", "bfloat16", "bfloat16 or int8")
    flags.DEFINE_integer(
        "image_size", 64, "pixels of a side, of drawn scenes and pictures in a .npz"
    )
    flags.DEFINE_integer("min_side", 1, "least pixels of a picture's shorter side")
    flags.DEFINE_float("max_aspect", 0.0, "longest side over shortest; 0: no limit")
    flags.DEFINE_integer(
        "stored_size", 0, "pixels to which the shorter side is reduced; 0: as it is"
    )
    flags.DEFINE_integer("shard_examples", 1000, "examples in one file of records")
    flags.DEFINE_integer("seed", 0, "of the order, and of drawn scenes")
    flags.DEFINE_float("max_bad_share", 0.5, "more that cannot be used stop the job")
    flags.DEFINE_integer("process_index", None, "of this process, from 0")
    flags.DEFINE_integer("process_count", None, "processes that share the work")
    flags.DEFINE_string("runner", "", "of Apache Beam, with --encoder=none")
    flags.DEFINE_string("runner_options", "", "for it: '--project=... --region=...'")
    flags.mark_flags_as_required(["source", "output"])


def main() -> None:
    """Prepares what the flags ask for."""
    names = inspect.signature(prepare).parameters.keys() - {"progress"}
    prepare(**{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
