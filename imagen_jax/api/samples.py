"""Pictures that are written as they are made, in a folder where a killed job goes on.

It holds job.json, what was asked for; NNNN.png of the last stage and NNNN_SIZEpx.png of
earlier ones, from which the next stage starts; samples.jsonl, a line for each finished
picture, in order; and at the end grids, sheets and, if asked for, tar files.
"""

import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import tarfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

import jax
import numpy as np
import tqdm

from imagen_jax import images
from imagen_jax.api.cascade import Cell, Texts, about, all_cells, settings
from imagen_jax.api.library import Cascade
from imagen_jax.diffusion.cascade import (
    Inputs,
    Settings,
    batch_rows,
    check_order,
    sample_stage,
)
from imagen_jax.errors import UserError
from imagen_jax.files import TEMPORARY, appearing, read_json, write_text
from imagen_jax.stores import check_disk
from imagen_jax.training.weights import Weights

JOB, LINES = "job.json", "samples.jsonl"
# Of a job with its prompts, a hundred times more than anyone types.
_JOB_BYTES = 2**30
# Pictures in a grid, and their largest side there: more are on further grids.
_GRID, _GRID_SIDE = 64, 256
# The first process writes `JOB`; a shared file system may show it late.
_SHARED_SECONDS = 120.0


def check_output(output: str) -> None:
    """Raises `UserError` unless there is a folder for pictures or one can be made."""
    check_disk(output)
    place = pathlib.Path(output).absolute()
    while not os.path.exists(place):
        place = place.parent
    if not output or not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"--output={output}: {place} is no folder to write to")


@dataclasses.dataclass
class Job:
    """What is made where: of every prompt `num_images` seeds, each in all cells."""

    output: str
    trained: Sequence[Weights]  # base first
    prompts: Sequence[str]
    seed: int = 0  # of the first picture; it counts up with each that is no other cell
    num_images: int = 1
    cells: Sequence[Cell] = ()  # empty for the stages' own values
    # If the first stage is no base: names and pictures `[h, w, 3]` uint8 to start from,
    # one or one for each prompt.
    lowres: Sequence[tuple[str, np.ndarray]] = ()
    recorded_steps: tuple[int, ...] = ()  # whose estimates are drawn, too
    # What is known of each prompt, for the lines of its pictures: its category.
    known: Sequence[dict[str, str]] = ()
    tar_images: int = 0  # pictures in each tar file; 0 writes none

    def __post_init__(self):
        self.folder = pathlib.Path(self.output)
        self.cells = self.cells or all_cells([one.cfg for one in self.trained])
        self.count = len(self.prompts) * self.num_images * len(self.cells)

    def path(self, number: int, stage: int = -1, kind: str = "") -> pathlib.Path:
        """The file of a picture of a stage; -1 is the last."""
        if stage not in (-1, len(self.trained) - 1) or kind:
            kind += f"_{self.trained[stage].cfg.image_size}px"
        return self.folder / f"{number:04d}{kind}.png"

    def asked(self, number: int) -> tuple[str, int, Cell]:
        """The prompt, the seed and the values of a picture."""
        row, cell = divmod(number, len(self.cells))
        return self.prompts[self.row(number)], self.seed + row, self.cells[cell]

    def row(self, number: int) -> int:
        """Which of the prompts a picture is of."""
        return number // len(self.cells) // self.num_images

    def start(self, number: int) -> tuple[str, np.ndarray]:
        """The name and the pixels of what a picture starts from."""
        return self.lowres[self.row(number) % len(self.lowres)]

    def read(self, stage: int = -1) -> np.ndarray:
        """All pictures of a stage, once they are made, `[N, H, W, 3]` uint8."""
        return np.stack([images.read(self.path(n, stage)) for n in range(self.count)])

    def missing(self, stage: int = -1) -> np.ndarray:
        """The numbers of the pictures that a stage has yet to make."""
        done = [
            self.path(number).exists() or self.path(number, stage).exists()
            for number in range(self.count)
        ]
        return np.flatnonzero(np.logical_not(done))


def _line(job: Job, number: int) -> dict[str, Any]:
    """All that is needed, beside `JOB`, to make a picture again."""
    prompt, seed, cell = job.asked(number)
    stages = range(len(job.trained) - 1)
    line = {
        "file": job.path(number).name,
        "prompt": prompt,
        "seed": seed,
        **(job.known[job.row(number)] if job.known else {}),
        "earlier_stages": [job.path(number, stage).name for stage in stages],
        **_values(cell),
    }
    return line | ({"lowres": job.start(number)[0]} if job.lowres else {})


def _values(cell: Cell) -> dict[str, list[Any]]:
    samplers = [cfg.sampler for cfg in cell.configs]
    return {
        "guidance": [one.guidance_schedule or one.guidance for one in samplers],
        "aug_level": [
            cfg.sampler.aug_level if cfg.lowres_size else None for cfg in cell.configs
        ],
    }


def _identity(job: Job) -> dict[str, Any]:
    """What decides the pictures, but for a rounding."""
    stages = []
    for one in job.trained:
        path = one.path if "://" in one.path else os.path.abspath(one.path)
        config = dataclasses.asdict(one.cfg)
        # Another one makes the same pictures, to a level of 255.
        del config["sampler"]["batch_size"]
        stages.append({"workdir": path, "checkpoint_step": one.step, "config": config})
    values = {
        "seed": job.seed,
        "num_images": job.num_images,
        "prompts": job.prompts,
        "values": [_values(cell) for cell in job.cells],
        "lowres": [hashlib.sha256(pixels).hexdigest() for _, pixels in job.lowres],
        "estimates": job.recorded_steps,
        "stages": stages,
    }
    return json.loads(json.dumps(values))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """What differs in two values of JSON: "seed is 0 there, 5 here"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**new, **old}:
            own = f"{path}.{key}".lstrip(".")
            yield from _differences(old.get(key), new.get(key), own)
    elif isinstance(old, list) and isinstance(new, list):
        for i, pair in enumerate(itertools.zip_longest(old, new)):
            yield from _differences(*pair, f"{path}[{i}]")
    elif old != new:
        there, here = ("none" if v is None else f"{v!r:.200}" for v in (old, new))
        yield f"{path} is {there} there, {here} here"


def _entered(job: Job) -> IO[bytes]:
    """Makes the folder of a job, or enters it again; returns its empty `LINES`.

    Of several processes the first one does so, and the others come after it; theirs
    is no file. Raises `UserError` when it cannot be written, holds anything else (names
    what differs), or another job is at work in it.
    """
    check_output(job.output)
    file, new = job.folder / JOB, _identity(job)
    first = jax.process_index() == 0
    waits_until = time.monotonic() + _SHARED_SECONDS
    while not (first or file.exists()):
        if time.monotonic() > waits_until:
            raise UserError(
                f"--output={job.output} has no {JOB}, which the first process writes: "
                "give a folder that all hosts share"
            )
        time.sleep(0.2)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in os.listdir(job.folder) if name[0] != "."]
        if all(name.endswith(TEMPORARY) for name in names):
            devices = [str(device) for device in jax.devices()]
            whole = {"asked": new, "jax": jax.__version__, "devices": devices}
            write_text(file, json.dumps(whole, indent=1) + "\n")
        if not file.exists():
            raise UserError(
                f"--output={job.output} holds files, and no {JOB} of `sample`: give a "
                "new folder"
            )
        old = read_json(file, "what a job of `sample` was asked for", _JOB_BYTES)
        differs = list(itertools.islice(_differences(old.get("asked"), new, ""), 4))
        if differs:
            more = "; and more" if len(differs) > 3 else ""
            raise UserError(
                f"--output={job.output} holds another job ({'; '.join(differs[:3])}"
                f"{more}): give another folder, or remove it"
            )
        lines = open(job.folder / LINES if first else os.devnull, "ab", buffering=0)
        if not first:
            return lines
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lines.truncate(0)
    except BlockingIOError:
        lines.close()
        raise UserError(
            f"another process samples to --output={job.output}: wait for its end"
        ) from None
    except OSError as error:
        raise UserError(
            f"--output={job.output} cannot be written: {error.strerror}"
        ) from None
    return lines


def _save(job: Job, number: int, stage: int, picture: np.ndarray, estimates) -> None:
    """Writes a picture, whole or not at all, and before it its estimates."""
    if job.recorded_steps:
        labels = [f"step {step}" for step in job.recorded_steps]
        path = job.path(number, stage, "_estimates")
        columns = min(8, len(labels))
        images.save_sheet(path, estimates, columns, labels, _caption(job, number))
    prompt, seed, cell = job.asked(number)
    used = slice(stage + 1)
    told = about(prompt, seed, job.trained[used], cell.configs[used])
    with appearing(job.path(number, stage)) as partial:
        images.save(partial, picture, told)


def _caption(job: Job, number: int, label: bool = True) -> str:
    prompt, seed, cell = job.asked(number)
    parts = [prompt, f"seed {seed}", cell.label if label else ""]
    return ", ".join(part for part in parts if part)


def _tell(job: Job, lines: IO[bytes], told: int) -> int:
    """Adds the lines of finished pictures after the first `told`; returns how many."""
    while told < job.count and job.path(told).exists():
        # In one piece, so that a line is there or not.
        lines.write((json.dumps(_line(job, told)) + "\n").encode())
        told += 1
    return told


def _inputs(
    job: Job, texts: Texts, stage: int, values: Settings, numbers: np.ndarray
) -> Inputs:
    rows, cells = np.divmod(numbers, len(job.cells))
    lowres = None
    if stage:
        lowres = np.stack([images.read(job.path(n, stage - 1)) for n in numbers])
    elif job.lowres:
        lowres = np.stack([job.start(n)[1] for n in numbers])
    text, mask = texts([job.asked(number)[0] for number in numbers])
    seeds = (job.seed + rows).astype(np.uint32)
    return Inputs(seeds, text, mask, *(each[cells] for each in values), lowres)


def make(job: Job, cascade: Cascade, show_steps: bool = False) -> None:
    """Makes what is missing of a job with the weights of its cascade, stage by stage.

    However many pictures there are, a batch of them is in memory. Several processes,
    each with a mesh of its own devices, share the pictures batch by batch; a picture
    stays with its process through all stages. `show_steps` has the progress bar count
    the steps of a batch too.

    Raises `UserError` when a stage does not take what the one before it makes, or the
    folder is another job's or cannot be written.
    """
    configs, mesh = [one.cfg for one in job.trained], cascade.loaded.mesh
    check_order(configs, made=configs[0].lowres_size if job.lowres else 0)
    sizes = [batch_rows(cfg.sampler.batch_size, job.count, mesh) for cfg in configs]
    with _entered(job) as lines:
        todo = [_own(job.missing(stage), max(sizes)) for stage in range(len(configs))]
        told = _tell(job, lines, 0)
        if todo[-1].size:
            prompts = [job.asked(number)[0] for number in todo[-1]]
            texts = cascade.loaded.embedded(prompts, job.folder)
        total = sum(map(len, todo))
        with tqdm.tqdm(
            total=total, desc="sample", unit="picture", disable=jax.process_index() != 0
        ) as bar:
            tell = (
                (lambda i, _: bar.set_postfix(step=int(i) + 1)) if show_steps else None
            )
            for stage, numbers in enumerate(todo):
                if not len(numbers):
                    continue
                values = settings([cell.configs[stage] for cell in job.cells])
                inputs = functools.partial(_inputs, job, texts, stage, values)
                for made in sample_stage(
                    cascade.loaded.stage(stage, configs[stage]),
                    numbers,
                    job.count,
                    inputs,
                    values,
                    mesh,
                    job.recorded_steps,
                    tell,
                ):
                    for number, picture, estimates in zip(*made):
                        _save(job, number, stage, picture, estimates)
                        told = _tell(job, lines, told)
                    bar.update(len(made[0]))
        # JAX ends those that wait when a process is lost.
        while len(job.missing()):
            time.sleep(1)
        _tell(job, lines, told)
    if jax.process_index() == 0:
        _show(job)


def _own(numbers: np.ndarray, size: int) -> np.ndarray:
    """Those of this process: every N-th `size` pictures, of N processes."""
    return numbers[numbers // size % jax.process_count() == jax.process_index()]


def _show(job: Job) -> None:
    """Draws grids, and of several cells a sheet for each prompt and seed."""
    each = len(job.cells)
    columns = len({str(_values(cell)["guidance"]) for cell in job.cells})
    labels = [cell.label for cell in job.cells]
    for first in range(0, job.count if each > 1 else 0, each):
        name, numbers = f"sheet_{first // each:04d}.png", range(first, first + each)
        title = _caption(job, first, label=False)
        _draw(job, name, numbers, columns, labels, title=title)
    for first in range(0, job.count, _GRID):
        name = f"grid_{first:04d}.png" if first else "grid.png"
        numbers = range(first, min(first + _GRID, job.count))
        captions = [_caption(job, number) for number in numbers]
        _draw(job, name, numbers, min(8, len(numbers)), captions, _GRID_SIDE)
    if job.tar_images:
        _pack(job)
    for path in job.folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _pack(job: Job) -> None:
    """Packs all pictures with their captions and lines, as WebDataset has it.

    Without times and owners, so that equal pictures make equal files.
    """
    for path in job.folder.glob("samples-*.tar"):  # of another number of pictures
        path.unlink()
    for part, first in enumerate(range(0, job.count, job.tar_images)):
        path = job.folder / f"samples-{part:05d}.tar"
        with appearing(path) as partial, tarfile.open(partial, "w") as tar:
            for number in range(first, min(first + job.tar_images, job.count)):
                line = _line(job, number)
                members = {
                    "png": job.path(number).read_bytes(),
                    "txt": line["prompt"].encode(),
                    "json": json.dumps(line).encode(),
                }
                for kind, data in members.items():
                    member = tarfile.TarInfo(f"{number:04d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def _draw(job, name, numbers, columns, captions, most_side=0, title=""):
    """Saves a sheet of pictures, unless it is there."""
    if not (job.folder / name).exists():
        shown = np.stack([images.read(job.path(n), most_side) for n in numbers])
        with appearing(job.folder / name) as partial:
            images.save_sheet(partial, shown, columns, captions, title)
