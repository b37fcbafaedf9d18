"""A whole data set in host memory, from one .npz file: no TensorFlow."""

import hashlib
import os
from collections.abc import Iterator

import numpy as np
from etils import epath
from jax.sharding import Mesh

from imagen_jax.batch import Batch, downsample, pad_text
from imagen_jax.config import StageConfig
from imagen_jax.data import manifest as manifests
from imagen_jax.data import stream
from imagen_jax.data.crop import crop_corner, is_flipped
from imagen_jax.errors import UserError
from imagen_jax.text import embeddings

# Pictures made smaller at a time when a file is opened: bounds the int32 copies.
_CHUNK = 256


def arrays(
    images: list[np.ndarray], text: list[bytes], ids: list[int], row_bytes: int
) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, without captions and manifest.

    Args:
      images: each `[S, S, 3]` uint8.
      text: `embeddings.to_bytes` of each.
      ids: of the examples.
      row_bytes: of one token of `text`.

    Returns:
      "image" `[N, S, S, 3]` uint8, "text" `[sum of n, row_bytes]` uint8 (tokens as
      `embeddings` writes them), "offset" `[N + 1]` int64 (example i has the rows
      offset[i] to offset[i + 1]), "id" `[N]` int64.
    """
    lengths = [len(data) // row_bytes for data in text]
    return {
        "image": np.stack(images),
        "text": np.frombuffer(b"".join(text), np.uint8).reshape(-1, row_bytes),
        "offset": np.cumsum([0, *lengths], dtype=np.int64),
        "id": np.asarray(ids, np.int64),
    }


def sha256(values: dict[str, np.ndarray]) -> str:
    """Of the arrays' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(np.ascontiguousarray(values[name]).data)
    return digest.hexdigest()


def write(
    path: os.PathLike,
    values: dict[str, np.ndarray],
    captions: list[str],
    manifest: manifests.Manifest,
) -> None:
    """Writes a .npz file; equal contents make equal bytes."""
    with open(path, "wb") as file:
        np.savez_compressed(
            file,
            **values,
            caption=np.array(captions),
            manifest=np.array(manifests.to_json(manifest)),
        )


def make_memory(
    cfg: StageConfig, mesh: Mesh, rows: np.ndarray | None = None
) -> stream.Stream:
    """Batches from a .npz file of `prepare`.

    Every epoch each example comes once, in a permutation of (data.seed, epoch); the
    order does not depend on the number of hosts.

    Args:
      cfg: the stage.
      mesh: over whose data and fsdp axes a batch is spread.
      rows: of every batch that are wanted here, ascending; by default those that
        this host's devices hold.

    Raises:
      UserError: when the file is missing, damaged, of another text encoder, or of a
        picture size that does not halve to the stage's, and for random squares.
    """
    manifest = manifests.read_manifest(cfg.data.records)
    if cfg.data.square != "middle":
        raise UserError(
            f"config.data.square is {cfg.data.square!r}, but {cfg.data.records!r} has "
            "the middle squares only: prepare a folder of records"
        )
    stream.check_text(cfg, manifest)
    held = stream.rows_here(cfg, mesh) if rows is None else rows
    with (
        epath.Path(cfg.data.records).open("rb") as opened,
        np.load(opened, allow_pickle=False) as file,
    ):
        image, text, offset, ids = (
            file[name] for name in ("image", "text", "offset", "id")
        )
    side = image.shape[1]
    if (
        side < cfg.image_size
        or side % cfg.image_size
        or not _power_of_two(side // cfg.image_size)
    ):
        raise UserError(
            f"{cfg.data.records!r} has pictures of {side} pixels, config.image_size is "
            f"{cfg.image_size}: prepare with --image_size={cfg.image_size}, or with a "
            "power of two times it"
        )
    image = np.concatenate(
        [
            downsample(image[i : i + _CHUNK], cfg.image_size)
            for i in range(0, len(image), _CHUNK)
        ]
    )

    def batch_at(number: int) -> Batch:
        numbers = number * cfg.training.batch_size + held
        epoch, place = np.divmod(numbers, len(ids))
        rows = np.empty(len(held), np.int64)
        for e in np.unique(epoch):
            order = np.random.default_rng((cfg.data.seed % 2**32, int(e))).permutation(
                len(ids)
            )
            rows[epoch == e] = order[place[epoch == e]]
        pictures = image[rows]
        if cfg.crop_size:
            corners = crop_corner(cfg, ids[rows], epoch)
            pictures = np.stack(
                [
                    whole[top : top + cfg.crop_size, left : left + cfg.crop_size]
                    for whole, top, left in zip(pictures, *corners)
                ]
            )
        if cfg.data.flip:
            mirrored = is_flipped(cfg, ids[rows], epoch)
            pictures = np.where(
                mirrored[:, None, None, None], pictures[:, :, ::-1], pictures
            )
        ragged = [
            embeddings.from_bytes(
                text[offset[row] : offset[row + 1]].tobytes(),
                cfg.text.dim,
                manifest.embedding_dtype,
            )
            for row in rows
        ]
        padded, mask = pad_text(ragged, cfg.text.length, cfg.text.dim)
        return Batch(pictures, padded, mask, ids[rows].astype(np.int32))

    def batches_from(start: int) -> Iterator[Batch]:
        while True:
            yield batch_at(start)
            start += 1

    identity = stream.identity(cfg, manifest.content_sha256, len(ids))
    return stream.Stream(batches_from, mesh, identity)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
