"""Writes a whole data set as one .npz file."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from imagen_jax.data import manifest as manifests
from imagen_jax.data import memory
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.preparing import disk, job
from imagen_jax.preparing.selection import select
from imagen_jax.preparing.tally import Tally, total
from imagen_jax.text import embeddings


def write(
    work: job.Job, asked: dict[str, Any], progress: Callable[[int], None]
) -> manifests.Manifest:
    """Writes `work` to its output, a .npz file; pictures that are too small stay out.

    Everything is in memory until then, so this does not resume.
    """
    size = asked["settings"]["image_size"]
    rules = work.rules.at_least(size)
    tally = Tally()
    rows = []
    for number in range(work.originals.shards):
        items = tally.chosen(select(work.originals.read(number), rules), progress)
        for item, text in job.embedded(items, work.embedder, tally):
            rows.append((item.id, item.caption, _pixels(item.picture.data, size), text))
    report = tally.report("arrays", "")
    summary = total([report], work.originals.problems)
    job.check_share(work, summary["examples"], summary["skipped"])
    ids, captions, images, text = zip(*rows)
    dim = work.embedder.encoder.dim
    values = memory.arrays(
        images, text, ids, embeddings.row_bytes(dim, work.embedder.dtype)
    )
    summary["shards"][0] |= {
        "sha256": memory.sha256(values),
        "sides": {str(size): len(ids)},
    }
    manifest = job.manifest(work, asked, summary)
    work.folder.parent.mkdir(parents=True, exist_ok=True)
    with disk.full(work.folder.parent), disk.appearing(work.folder) as partial:
        memory.write(partial, values, captions, manifest)
    return manifest


def _pixels(data: bytes, image_size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    # Decoders agree about PNG only; drawn scenes need no TensorFlow.
    if image.format == "PNG" and image.size == (image_size, image_size):
        return np.asarray(image.convert("RGB"))
    start_tensorflow()
    from imagen_jax.data import preprocess

    return preprocess.picture(data, image_size).numpy()
