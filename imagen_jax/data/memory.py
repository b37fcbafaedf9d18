"""A whole data set in host memory, from one .npz file: no TensorFlow."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from imagen_jax.batch import Batch, downsample, pad_text
from imagen_jax.config import StageConfig
from imagen_jax.data.choice import choice, nothing_left
from imagen_jax.data.manifest import NPZ, Manifest, Source, to_json
from imagen_jax.data.order import crop_corner, is_flipped
from imagen_jax.errors import UserError
from imagen_jax.files import read_arrays
from imagen_jax.text import embeddings

# Images that are downsampled at once when a file is opened: bounds the int32 copies.
_CHUNK = 256


def arrays(
    images: list[np.ndarray],
    text: list[bytes],
    ids: list[int],
    row_bytes: int,
    scores: Sequence[Sequence[float]] = (),
) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, without captions and manifest.

    Images are `[S, S, 3]` uint8, `text` is `embeddings.to_bytes` of each caption.

    Returns:
      "image" `[N, S, S, 3]` uint8, "text" `[sum of n, row_bytes]` uint8, "offset"
      `[N + 1]` int64 (example i has the rows offset[i] to offset[i + 1] of "text"),
      "id" `[N]` int64; and "scores" `[N, K]` float32, if there are any.
    """
    lengths = [len(data) // row_bytes for data in text]
    own = {"scores": np.asarray(scores, np.float32)} if any(scores) else {}
    return own | {
        "image": np.stack(images),
        "text": np.frombuffer(b"".join(text), np.uint8).reshape(-1, row_bytes),
        "offset": np.cumsum([0, *lengths], dtype=np.int64),
        "id": np.asarray(ids, np.int64),
    }


def sha256(values: dict[str, np.ndarray]) -> str:
    """Hash of the arrays' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(np.ascontiguousarray(values[name]).data)
    return digest.hexdigest()


def write(
    path: os.PathLike,
    values: dict[str, np.ndarray],
    captions: list[str],
    manifest: Manifest,
) -> None:
    """Writes a .npz file; equal contents make equal bytes.

    Caption i is UTF-8 in the bytes caption_offset[i] to caption_offset[i + 1] of
    "caption". Only previews read it.
    """
    texts = [caption.encode() for caption in captions]
    own = {
        "caption": np.frombuffer(b"".join(texts), np.uint8),
        "caption_offset": np.cumsum([0, *map(len, texts)], dtype=np.int64),
        "manifest": np.array(to_json(manifest)),
    }
    with open(path, "wb") as file:
        np.savez_compressed(file, **values, **own)


def read(path: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """The `arrays` of a .npz file with `manifest`; `UserError` for any other file."""
    side = int(next(side for shard in manifest.shards for side in shard["sides"]))
    width = embeddings.row_bytes(manifest.text_dim, manifest.embedding_dtype)
    count, rows = manifest.examples, manifest.text_bytes // width
    expected = {
        "image": ("|u1", (count, side, side, 3)),
        "text": ("|u1", (rows, width)),
        "offset": ("<i8", (count + 1,)),
        "id": ("<i8", (count,)),
    }
    if manifest.scores:
        expected["scores"] = ("<f4", (count, len(manifest.scores)))
    values = read_arrays(path, NPZ, expected)
    offset, ids = values["offset"], values["id"]
    if sha256(values) != manifest.shards[0]["sha256"]:
        fault = "they do not have the hash that its manifest says"
    elif offset[0] or offset[-1] != rows or (offset[1:] < offset[:-1]).any():
        fault = "the offsets do not rise from 0 to the end of the text"
    elif ids.min() < 0 or ids.max() >= 2**31:
        fault = "an id is no number of an example"
    else:
        return values
    raise UserError(f"the arrays of {path!r} are damaged: {fault}; copy it again")


def read_captions(path: str, count: int) -> list[bytes]:
    """The captions of a .npz file, empty in those of release 0.2 and before."""
    try:
        expected = {"caption_offset": ("<i8", (count + 1,))}
        ends = read_arrays(path, NPZ, expected)["caption_offset"].tolist()
        data = read_arrays(path, NPZ, {"caption": ("|u1", (ends[-1],))})["caption"]
    except UserError:
        return [b""] * count
    return [data[a:b].tobytes() for a, b in itertools.pairwise(ends)]


def open_npz(
    cfg: StageConfig, source: Source, rows: np.ndarray, heldout: bool
) -> Callable[[int], Iterator[Batch]]:
    """Loads a .npz file; the result yields batches from any number on.

    In every epoch each example that `choice` leaves comes once, in a permutation of
    (data.seed, epoch). `rows` `[n]` int64 are the rows of every batch that are wanted,
    ascending.
    """
    manifest = source.manifest
    path, size, crop = cfg.data.records, cfg.image_size, cfg.crop_size
    if cfg.data.square != "middle":
        raise UserError(
            f"config.data.square is {cfg.data.square!r}, but {path!r} has the middle "
            "squares only: prepare a folder of records"
        )
    values = read(path, manifest)
    image, text, offset, ids = (values[n] for n in ("image", "text", "offset", "id"))
    captions = np.array(read_captions(path, len(ids)), object)
    chosen = np.arange(len(ids))
    if is_chosen := choice(cfg.data, source, heldout):
        scores = values["scores"].T if manifest.scores else ()
        chosen = np.flatnonzero(is_chosen(ids, dict(zip(manifest.scores, scores))))
    if not len(chosen):
        raise nothing_left(path)
    side = image.shape[1]
    if side not in (size * 2**k for k in range(16)):
        raise UserError(
            f"{path!r} has images of {side} pixels, config.image_size is {size}: "
            f"prepare with --image_size={size}, or with a power of two times it"
        )
    if side > size:
        chunks = np.split(image, range(_CHUNK, len(image), _CHUNK))
        image = np.concatenate([downsample(chunk, size) for chunk in chunks])

    def batch_at(number: int) -> Batch:
        count = len(chosen)
        epochs, places = np.divmod(number * cfg.training.batch_size + rows, count)
        own = np.empty(len(rows), np.int64)
        for epoch in np.unique(epochs):
            random = np.random.default_rng((cfg.data.seed % 2**32, int(epoch)))
            here = epochs == epoch
            own[here] = chosen[random.permutation(count)[places[here]]]
        images = image[own]
        if crop:
            corners = zip(*crop_corner(cfg, ids[own], epochs))
            images = np.stack(
                [
                    whole[top : top + crop, left : left + crop]
                    for whole, (top, left) in zip(images, corners)
                ]
            )
        if cfg.data.flip:
            flipped = is_flipped(cfg, ids[own], epochs)[:, None, None, None]
            images = np.where(flipped, images[:, :, ::-1], images)
        ragged = [
            embeddings.from_bytes(
                text[offset[i] : offset[i + 1]].tobytes(),
                cfg.text.dim,
                manifest.embedding_dtype,
            )
            for i in own
        ]
        padded, mask = pad_text(ragged, cfg.text.length, cfg.text.dim)
        return Batch(images, padded, mask, ids[own].astype(np.int32), captions[own])

    return lambda start: map(batch_at, itertools.count(start))
