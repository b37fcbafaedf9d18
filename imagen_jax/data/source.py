"""From a config to its batches, whatever the records are."""

import math

import jax
from etils import epath
from jax.sharding import Mesh

from imagen_jax.batch import batch_spec
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
    parts = read_parts(cfg.data.records)
    if epath.Path(parts[0].path).is_file():
        from imagen_jax.data.memory import make_memory

        return make_memory(cfg, mesh)
    start_tensorflow()
    from imagen_jax.data.pipeline import make_pipeline

    return make_pipeline(cfg, mesh)


def queue_bytes(cfg: StageConfig, hosts: int = 1) -> int:
    """What the queues in front of one of `hosts` hold, about: the config bounds it.

    data.shuffle_examples encoded records, of mean size, or all if they are fewer; and
    five batches: one on the devices, two that wait, two in the making. Some hundred
    encoded records that are read ahead are not counted. A .npz file has no queue but
    the first of these; all of it is in memory.
    """
    leaves = jax.tree.leaves(batch_spec(cfg))
    batch = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves) // hosts
    parts = read_parts(cfg.data.records)
    if epath.Path(parts[0].path).is_file():
        return batch
    weights = sum(part.weight for part in parts)
    shuffled = 0.0
    for part in parts:
        count = part.manifest.examples
        stored = part.manifest.image_bytes + part.manifest.text_bytes
        held = min(count, cfg.data.shuffle_examples * part.weight / weights)
        shuffled += held * stored / count
    return round(shuffled) + 5 * batch
