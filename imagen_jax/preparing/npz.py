"""Writes a whole data set as one .npz file for host memory."""

import io

import numpy as np
from PIL import Image

from imagen_jax.data import memory
from imagen_jax.data.manifest import Manifest
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.preparing import job as jobs
from imagen_jax.preparing.stats import Stats, total
from imagen_jax.text import embeddings


def write(job: jobs.Job, progress: jobs.Progress) -> Manifest:
    """Writes the file of a job; images smaller than its image_size are left out.

    Everything is in memory until the end, so this does not resume.
    """
    size = job.settings.image_size
    stats, rows = Stats(), []
    for number in range(job.source.shards):
        for example, image, text in jobs.usable(job, number, stats, progress):
            pixels = _pixels(image.data, size)
            rows.append((example.id, example.caption, pixels, text.data))
    summary = total([stats.report("arrays", "")], job.source.problems)
    jobs.check_share(job, summary["examples"], summary["skipped"])
    ids, captions, images, text = zip(*rows)
    row_bytes = embeddings.row_bytes(job.embedder.encoder.dim, job.embedder.dtype)
    arrays = memory.arrays(images, text, ids, row_bytes)
    summary["shards"][0] |= {
        "sha256": memory.sha256(arrays),
        "sides": {str(size): len(ids)},
    }
    manifest = jobs.make_manifest(job, summary)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with jobs.appearing(job.output) as partial:
        memory.write(partial, arrays, captions, manifest)
    return manifest


def _pixels(data: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    # Decoders agree about PNG only. Drawn scenes need no TensorFlow.
    if image.format == "PNG" and image.size == (size, size):
        return np.asarray(image.convert("RGB"))
    start_tensorflow()
    from imagen_jax.data import preprocess

    return preprocess.picture(data, size).numpy()
