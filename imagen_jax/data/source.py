"""From a config to its batches, whatever the records are."""

import os
import pathlib
import sys

import jax
from jax.sharding import Mesh

from imagen_jax.config import StageConfig
from imagen_jax.data.manifest import read_manifest
from imagen_jax.data.stream import Stream


def open_records(cfg: StageConfig, mesh: Mesh) -> Stream:
    """The batches of `cfg.data.records` on this host.

    A .npz file is read without TensorFlow, a folder with it.

    Raises:
      UserError: when the records are missing, incomplete or do not fit the config.
    """
    hosts = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    read_manifest(cfg.data.records)
    if pathlib.Path(cfg.data.records).is_file():
        from imagen_jax.data.memory import make_memory

        return make_memory(cfg, mesh, **hosts)
    import_tensorflow()
    from imagen_jax.data.pipeline import make_pipeline

    return make_pipeline(cfg, mesh, **hosts)


def import_tensorflow() -> None:
    """Imports TensorFlow without the notes that it prints on starting.

    They come from C++ before its log level is read, so stderr itself is shut
    meanwhile. With TF_CPP_MIN_LOG_LEVEL set by the user, all is shown that they ask.
    """
    if "tensorflow" in sys.modules or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
