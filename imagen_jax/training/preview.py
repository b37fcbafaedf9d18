"""Pictures that show how far a training is."""

import dataclasses

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from imagen_jax import images
from imagen_jax.batch import downsample
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.cascade import Stage, sample_cascade
from imagen_jax.models import network
from imagen_jax.training.metrics import PREVIEWS, MetricWriter
from imagen_jax.training.state import TrainState

_COLUMNS = 8
_TILE = 128  # pixels that a picture has at least on the sheet


@dataclasses.dataclass(frozen=True)
class Preview:
    """What is sampled as training goes, on the host: N examples, then P prompts."""

    image: np.ndarray  # [N, H, W, 3] uint8, the pictures of the examples
    text: np.ndarray  # [N + P, L, D] bfloat16
    mask: np.ndarray  # [N + P, L] bool
    captions: tuple[str, ...]  # N + P


def save_preview(
    cfg: StageConfig,
    workdir: str,
    state: TrainState,
    preview: Preview,
    mesh: Mesh,
    writer: MetricWriter,
) -> None:
    """Samples `preview` with the averaged parameters, and saves the sheet.

    The p-th prompt of a super-resolution stage enlarges the input of the p-th example.
    """
    count, step = len(preview.captions), int(state.step)
    lowres = None
    if cfg.lowres_size:
        lowres = downsample(preview.image, cfg.train_lowres_size)
        prompts = np.arange(count - len(lowres)) % len(lowres)
        lowres = np.concatenate([lowres, lowres[prompts]])
    # A stage that trains on crops is shown at the size of its crops.
    cfg = dataclasses.replace(
        cfg,
        image_size=cfg.train_size,
        lowres_size=cfg.train_lowres_size,
        crop_size=0,
        sampler=dataclasses.replace(cfg.sampler, batch_size=count),
    )
    stage = Stage(params=state.ema, cfg=cfg, apply=network.apply)
    (samples,), _ = sample_cascade(
        [stage], preview.text, preview.mask, np.arange(count), mesh, lowres
    )
    if jax.process_index() == 0:
        made = sheet(samples, preview, lowres)
        folder = epath.Path(workdir) / PREVIEWS
        folder.mkdir(exist_ok=True)
        images.save(folder / f"{step:08d}.png", made)
        writer.image(step, PREVIEWS, made)


def sheet(
    samples: np.ndarray, preview: Preview, lowres: np.ndarray | None
) -> np.ndarray:
    """Labelled rows of what was given, sampled and real, captions below them.

    `samples` are `[N + P, S, S, 3]`, `lowres` `[N + P, s, s, 3]`, both uint8; so is the
    result, `[H, W, 3]`.
    """
    side = samples.shape[1]
    side *= -(-_TILE // side)
    known, count = len(preview.image), len(samples)
    columns = min(_COLUMNS, max(known, count - known))
    given = {} if lowres is None else {"input": lowres}
    pictures, captions, names = [], [], []
    for start, end in ((0, known), (known, count)):
        # Nobody knows how a prompt really looks.
        real = {} if start else {"real": preview.image}
        shown = given | {"sampled": samples} | real
        for i in range(start, end, columns):
            own = slice(i, min(i + columns, end))
            empty = columns - (own.stop - i)
            for rows in shown.values():
                row = images.enlarge(rows[own], side)
                white = ((0, empty), (0, 0), (0, 0), (0, 0))
                pictures.append(np.pad(row, white, constant_values=255))
            captions += [""] * columns * (len(shown) - 1)
            captions += [*preview.captions[own], *[""] * empty]
            names += shown
    return images.grid(np.concatenate(pictures), columns, captions, names)
