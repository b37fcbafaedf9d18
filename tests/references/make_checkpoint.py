"""Makes checkpoint.zip and checkpoint.npz: what a training left, and samples of it.

python -m tests.references.make_checkpoint

The workdir of a training of four steps, without the part that only resuming reads, and
what was sampled from it. Every later version has to read it, or refuse it by its schema
version; so it is made anew only with a new `SCHEMA_VERSION`.
"""

import pathlib
import tempfile
import zipfile
import zlib

import jax
import numpy as np
from flax import traverse_util

from imagen_jax.api.cascade import load, open_stages
from imagen_jax.config import MeshConfig
from imagen_jax.diffusion.cascade import sample_cascade
from imagen_jax.sharding import make_mesh
from imagen_jax.training import checksums, loop
from imagen_jax.training.checkpoint import SAMPLED
from tests import tiny

FOLDER = pathlib.Path(__file__).parent
# Narrower than the other tests' smallest: these files are kept for ever.
CFG = tiny.stage(
    model={
        "channels": (4,),
        "num_res_blocks": (1,),
        "self_attention": (True,),
        "text_attention": (True,),
        "head_channels": 4,
    },
    text={"length": 4, "dim": 4},
)
SEEDS = np.arange(8)


def sample(workdir: str) -> np.ndarray:
    """Pictures `[8, 8, 8, 3]` uint8 of fixed text from the newest checkpoint."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = tiny.batch(CFG, seed=99)
    (stage,) = open_stages([workdir])
    (made,), _ = sample_cascade(
        [load(stage, mesh)], batch.text, batch.mask, SEEDS, mesh
    )
    return made


def fingerprints(params) -> dict[str, np.ndarray]:
    """The names of the parameters, in order, and the CRC-32 of each one's bytes."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep=".")
    names = sorted(flat)
    sums = [zlib.crc32(np.ascontiguousarray(flat[name])) for name in names]
    return {"names": np.array(names), "sums": np.array(sums)}


def main() -> None:
    """Writes both files."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        state = loop.train(CFG, folder, tiny.Batches(CFG, mesh), mesh)
        np.savez_compressed(
            FOLDER / "checkpoint.npz",
            pictures=sample(folder),
            **fingerprints(state.ema),
        )
        step = workdir / "checkpoints/4"
        kept = [workdir / "config.json", step / "_CHECKPOINT_METADATA"]
        for item in (*SAMPLED, checksums.ITEM):
            kept += (step / item).rglob("*")
        with zipfile.ZipFile(
            FOLDER / "checkpoint.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9
        ) as file:
            for path in sorted(kept):
                if path.is_file():
                    # Without times, so that the same content is the same file.
                    entry = zipfile.ZipInfo(path.relative_to(workdir).as_posix())
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    file.writestr(entry, path.read_bytes())


if __name__ == "__main__":
    main()
