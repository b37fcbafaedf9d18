"""Turns captioned pictures into records for training.

python -m imagen_jax.prepare --source=folder:DIR --output=RECORDS --encoder=tiny

Verifies every picture, embeds every caption once with the frozen text encoder, and
writes a folder of records, or with --output=FILE.npz one file that training reads
without TensorFlow. --source=shapes:N draws N captioned scenes.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tqdm
from absl import flags
from PIL import Image

from imagen_jax import cli
from imagen_jax.data import folder, memory, originals, text
from imagen_jax.data import manifest as manifests
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.errors import UserError

_NAMED_SKIPS = 100
# Pictures that wait in memory for their turn.
_READ_AHEAD = 64


@dataclasses.dataclass
class _Tally:
    """What happened to the examples so far."""

    total: int
    skipped: list[tuple[str, str]]
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)
    reencoded: int = 0
    cut: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Row:
    id: int
    caption: str
    picture: folder.Picture
    text: np.ndarray


def prepare(
    source: str,
    output: str,
    encoder: str = "tiny",
    encoder_weights: str = "",
    encoder_dtype: str = "",
    text_length: int = 128,
    image_size: int = 64,
    shard_examples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> manifests.Manifest:
    """Writes the records of `source` to `output`.

    Equal arguments and an equal source make equal bytes. Nothing is at `output` until
    all is written. What is there already is kept if it is the same, else refused.

    Args:
      source: "folder:DIR" or "shapes:N".
      output: a folder to be, or FILE.npz.
      encoder: name of the text encoder.
      encoder_weights: its weights, for encoders that have none built in.
      encoder_dtype: "bfloat16" (default) or "float32", of a T5's computation.
      text_length: tokens of a caption that are kept.
      image_size: pixels of a side, of drawn scenes and of pictures in a .npz file;
        records of a folder keep the files of its pictures.
      shard_examples: examples in one file of records.
      seed: of the order of a folder's pictures and of drawn scenes.
      progress: whether to show a bar and a summary.

    Raises:
      UserError: for bad arguments, a source that is not as it must be or of which
        more than half cannot be used, and an output that holds something else.
    """
    for name, value in (
        ("text_length", text_length),
        ("image_size", image_size),
        ("shard_examples", shard_examples),
    ):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be above zero")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must not be negative")
    if not output:
        raise UserError("--output is empty: give a folder to be, or FILE.npz")
    encode = text.load_encoder(encoder, encoder_weights, encoder_dtype)
    source_now = originals.open_originals(source, image_size, seed)
    settings = {
        "source": source,
        "text_length": text_length,
        "image_size": image_size,
        "shard_examples": shard_examples,
        "seed": seed,
    }
    path = pathlib.Path(output)
    old = _finished(path, settings, encode.identity, source_now)
    if old:
        if progress:
            print(f"already prepared: {old.examples} examples in {output}")
        return old
    npz = path.suffix == ".npz"
    if not npz:
        # Before the bar, which its start would interrupt.
        start_tensorflow()
    tally = _Tally(
        source_now.count + len(source_now.problems), list(source_now.problems)
    )
    bar = tqdm.tqdm(source_now.examples, total=source_now.count, disable=not progress)
    usable = _verified(bar, tally, smallest=image_size if npz else 1)
    shards = (
        _embedded(chunk, tally, encode, text_length)
        for chunk in _chunks(usable, shard_examples)
    )
    partial = path.with_name(path.name + manifests.PARTIAL)
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write = _write_npz if npz else _write_folder
        manifest = write(partial, shards, settings, encode, tally)
        os.replace(partial, path)
    finally:
        _remove(partial)
    if progress:
        print(_summary(manifest, output))
    return manifest


def _finished(path, settings, encoder, source) -> manifests.Manifest | None:
    """The manifest at `path` if it is what would be written; None if nothing is."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    try:
        old = manifests.read_manifest(path)
    except UserError:
        raise UserError(
            f"--output={str(path)!r} exists and was not written by `prepare`: give "
            "another name, or remove it"
        ) from None
    differs = [
        f"{name} {old.settings.get(name)!r}, not {value!r}"
        for name, value in settings.items()
        if old.settings.get(name) != value
    ]
    if old.encoder != encoder:
        differs.append(f"encoder {old.encoder!r}, not {encoder!r}")
    if not differs:
        digest = hashlib.sha256()
        for example in source.examples:
            _update(digest, example, b"" if example.stamp else example.read())
        if digest.hexdigest() != old.source_sha256:
            differs.append("other pictures or captions")
    if differs:
        raise UserError(
            f"--output={str(path)!r} was prepared with {'; '.join(differs)}: give "
            "another name, or remove it"
        )
    return old


def _update(digest, example: originals.Example, content: bytes) -> None:
    content = example.stamp.encode() or content
    head = [example.name, example.caption, len(content)]
    digest.update(json.dumps(head).encode() + content)


def _verified(examples, tally, smallest):
    """Yields the (example, picture) that can be used, in order; counts the others."""

    def read(example):
        data = example.read()
        try:
            return example, data, folder.verify(data), ""
        except folder.BrokenPicture as error:
            return example, data, None, str(error)

    for example, data, picture, reason in _parallel(read, examples):
        _update(tally.digest, example, data)
        if picture and picture.side < smallest:
            reason = f"its shorter side has {picture.side} of {smallest} pixels"
        if reason:
            tally.skipped.append((example.name, reason))
        else:
            tally.reencoded += picture.reencoded
            yield example, picture


def _parallel(function: Callable, items: Iterable) -> Iterator:
    # Executor.map would read all items ahead.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _embedded(chunk, tally, encode, text_length) -> list[_Row]:
    captions = [example.caption for example, _ in chunk]
    rows = encode.encode(captions, text_length)
    tally.tokens += [len(row) for row in rows]
    tally.cut += sum(len(encode.tokenize(c)) > text_length for c in captions)
    return [
        _Row(example.id, example.caption, picture, row)
        for (example, picture), row in zip(chunk, rows)
    ]


def _write_folder(partial, shards, settings, encode, tally) -> manifests.Manifest:
    from imagen_jax.data import tasks

    partial.mkdir()
    written = []
    for number, rows in enumerate(shards):
        file = f"records-{number:05d}.tfrecord"
        fields = (
            {
                "id": row.id,
                "image": row.picture.data,
                "caption": row.caption.encode(),
                "text": text.to_bytes(row.text),
                "side": row.picture.side,
            }
            for row in rows
        )
        tasks.write_shard(partial / file, fields)
        with open(partial / file, "rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        sides = [row.picture.side for row in rows]
        written.append(_shard(file, sha256, sides))
    manifest = _manifest(settings, encode, tally, written)
    (partial / manifests.FILE_NAME).write_text(manifests.to_json(manifest), "utf8")
    return manifest


def _write_npz(partial, shards, settings, encode, tally) -> manifests.Manifest:
    rows = list(itertools.chain.from_iterable(shards))
    _check_tally(settings, tally)
    size = settings["image_size"]
    values = memory.arrays(
        [_pixels(row.picture.data, size) for row in rows],
        [row.text for row in rows],
        [row.id for row in rows],
    )
    written = [_shard("arrays", memory.sha256(values), [size] * len(rows))]
    manifest = _manifest(settings, encode, tally, written)
    memory.write(partial, values, [row.caption for row in rows], manifest)
    return manifest


def _shard(file: str, sha256: str, sides: list[int]) -> dict[str, Any]:
    counts = {str(side): n for side, n in sorted(collections.Counter(sides).items())}
    return {"file": file, "examples": len(sides), "sha256": sha256, "sides": counts}


def _check_tally(settings, tally: _Tally) -> None:
    if 2 * len(tally.skipped) > tally.total or not tally.tokens:
        file, reason = tally.skipped[0]
        raise UserError(
            f"{len(tally.skipped)} of {tally.total} examples of {settings['source']!r} "
            f"cannot be used, first {file!r}: {reason}; nothing was written"
        )


def _manifest(settings, encode, tally, written) -> manifests.Manifest:
    _check_tally(settings, tally)
    return manifests.Manifest(
        settings=settings,
        source_sha256=tally.digest.hexdigest(),
        encoder=encode.identity,
        text_dim=encode.dim,
        examples=len(tally.tokens),
        tokens_max=max(tally.tokens),
        tokens_mean=round(sum(tally.tokens) / len(tally.tokens), 2),
        cut_captions=tally.cut,
        reencoded=tally.reencoded,
        skipped=len(tally.skipped),
        skipped_files=[
            {"file": file, "reason": reason}
            for file, reason in tally.skipped[:_NAMED_SKIPS]
        ],
        shards=written,
    )


def _pixels(data: bytes, image_size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    # Decoders agree about PNG only; drawn scenes need no TensorFlow.
    if image.format == "PNG" and image.size == (image_size, image_size):
        return np.asarray(image.convert("RGB"))
    start_tensorflow()
    from imagen_jax.data import preprocess

    return preprocess.picture(data, image_size).numpy()


def _summary(manifest: manifests.Manifest, output: str) -> str:
    lines = [f"prepared {manifest.examples} examples in {output}"]
    lines.append(
        f"text: {manifest.encoder}, {manifest.tokens_mean} tokens a caption, "
        f"at most {manifest.tokens_max}"
    )
    if manifest.cut_captions:
        lines.append(f"cut: {manifest.cut_captions} captions were too long")
    if manifest.reencoded:
        lines.append(f"made RGB: {manifest.reencoded} pictures")
    if manifest.skipped:
        lines.append(f"skipped: {manifest.skipped} examples, listed in the manifest:")
        lines += [f"  {s['file']}: {s['reason']}" for s in manifest.skipped_files[:5]]
    return "\n".join(lines)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_string("source", None, "folder:DIR or shapes:N")
    flags.DEFINE_string("output", None, "a folder to be, or FILE.npz")
    flags.DEFINE_string(
        "encoder",
        "tiny",
        "the frozen text encoder: tiny, t5_1_1_SIZE, t5_1_0_SIZE, hf:NAME_OR_PATH or "
        "t5x:CHECKPOINT (docs/text_encoders.md)",
    )
    flags.DEFINE_string("encoder_weights", "", "its weights, if it has none built in")
    flags.DEFINE_string(
        "encoder_dtype", "", "bfloat16 (default) or float32, of a T5's computation"
    )
    flags.DEFINE_integer("text_length", 128, "tokens of a caption that are kept")
    flags.DEFINE_integer(
        "image_size", 64, "pixels of a side, of drawn scenes and pictures in a .npz"
    )
    flags.DEFINE_integer("shard_examples", 1000, "examples in one file of records")
    flags.DEFINE_integer("seed", 0, "of the order, and of drawn scenes")
    flags.mark_flags_as_required(["source", "output"])


def main() -> None:
    """Prepares what the flags ask for."""
    names = (
        "source output encoder encoder_weights encoder_dtype text_length image_size "
        "shard_examples seed"
    )
    prepare(**{name: flags.FLAGS[name].value for name in names.split()})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
