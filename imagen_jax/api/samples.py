"""The folder that sampled pictures are written to."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from imagen_jax import images
from imagen_jax.api.cascade import Cell, all_cells
from imagen_jax.errors import UserError
from imagen_jax.training.weights import Weights


def check_output(output: str) -> None:
    """Raises `UserError` unless there is a folder for pictures or one can be made."""
    if "://" in output:
        raise UserError(f"--output={output}: sample to a disk, then copy the folder")
    place = pathlib.Path(output).absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"--output={output}: {place} is no folder to write to")


def write(
    output: str,
    trained: Sequence[Weights],
    prompts: Sequence[str],
    seeds: np.ndarray,
    samples: Sequence[np.ndarray],
    cells: Sequence[Cell] = (),
    lowres: Sequence[str] = (),
) -> None:
    """Writes what `sample_prompts` returned for the same arguments to a folder.

    NNNN.png of the last stage, NNNN_SIZEpx.png of earlier ones, samples.json (all that
    is needed to make each picture again), grid.png and, for several cells,
    sheet_NNNN.png of each prompt. `samples` are `[N, H, W, 3]` uint8 of each stage,
    `lowres` the files that the first one started from: none, one, or one per prompt.
    """
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    cells = cells or all_cells([one.cfg for one in trained])
    records = []
    for i in range(len(samples[-1])):
        prompt, cell = i // len(cells), cells[i % len(cells)]
        names = [f"{i:04d}_{s.shape[1]}px.png" for s in samples[:-1]] + [f"{i:04d}.png"]
        for name, of_stage in zip(names, samples, strict=True):
            images.save(folder / name, of_stage[i])
        record = {
            "file": names[-1],
            "prompt": prompts[prompt],
            "seed": int(seeds[prompt]),
            "earlier_stages": names[:-1],
            "guidance": [
                cfg.sampler.guidance_schedule or cfg.sampler.guidance
                for cfg in cell.configs
            ],
            "aug_level": [
                cfg.sampler.aug_level if cfg.lowres_size else None
                for cfg in cell.configs
            ],
        }
        if lowres:
            record["lowres"] = lowres[prompt % len(lowres)]
        records.append(record)
    if len(cells) > 1:
        columns = len({str(record["guidance"]) for record in records})
        labels = [cell.label for cell in cells]
        for i, shown in enumerate(np.split(samples[-1], len(prompts))):
            images.save_sheet(folder / f"sheet_{i:04d}.png", shown, columns, labels)
    captions = [record["prompt"] for record in records]
    images.save_sheet(folder / "grid.png", samples[-1], min(8, len(captions)), captions)
    stages = [
        {
            "workdir": one.path,
            "checkpoint_step": one.step,
            "config": dataclasses.asdict(one.cfg),
        }
        for one in trained
    ]
    description = {
        "pictures": records,
        "stages": stages,
        "versions": {"jax": jax.__version__},
        "devices": [str(device) for device in jax.devices()],
    }
    (folder / "samples.json").write_text(json.dumps(description, indent=1) + "\n")
