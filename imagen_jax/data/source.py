"""From a config to its batches, whatever the records are."""

import jax
from etils import epath
from jax.sharding import Mesh

from imagen_jax.config import StageConfig
from imagen_jax.data.mixture import read_parts
from imagen_jax.data.start_tensorflow import start_tensorflow
from imagen_jax.data.stream import Stream


def open_records(cfg: StageConfig, mesh: Mesh) -> Stream:
    """The batches of `cfg.data.records` on this host.

    A .npz file is read without TensorFlow, folders with it.

    Raises:
      UserError: when the records are missing, incomplete or do not fit the config.
    """
    hosts = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    parts = read_parts(cfg.data.records)
    if epath.Path(parts[0].path).is_file():
        from imagen_jax.data.memory import make_memory

        return make_memory(cfg, mesh, **hosts)
    start_tensorflow()
    from imagen_jax.data.pipeline import make_pipeline

    return make_pipeline(cfg, mesh, **hosts)
