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
    rows = {"sampled": samples, "real": preview.image}
    if lowres is not None:
        rows = {"input": lowres} | rows
    blocks = []
    for start, end in ((0, known), (known, count)):
        for i in range(start, end, _COLUMNS):
            own = slice(i, min(i + _COLUMNS, end))
            shown = {n: images.enlarge(x[own], side) for n, x in rows.items()}
            if start:  # Nobody knows how a prompt really looks.
                del shown["real"]
            captions = preview.captions[own]
            above = [""] * (len(captions) * (len(shown) - 1))
            pictures = np.concatenate(list(shown.values()))
            names, texts = list(shown), [*above, *captions]
            blocks.append(images.grid(pictures, len(captions), texts, names))
    width = max(block.shape[1] for block in blocks)
    return np.concatenate(
        [
            np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255)
            for b in blocks
        ]
    )
