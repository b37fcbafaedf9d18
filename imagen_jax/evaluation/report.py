"""From a folder of samples to figures, and to what must be told with them."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from imagen_jax import images
from imagen_jax.errors import UserError
from imagen_jax.evaluation import distances
from imagen_jax.evaluation.alignment import Clip, clip_score
from imagen_jax.evaluation.distances import Statistics
from imagen_jax.evaluation.features import Extractor, batches
from imagen_jax.files import is_file_name, parse_json, read_json, read_lines

# What `sample` leaves beside its pictures. Others may write the first one.
LINES, JOB = "samples.jsonl", "job.json"
_JOB_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Samples:
    """Pictures that were made with the same values."""

    files: Sequence[pathlib.Path]
    captions: Sequence[str] = ()  # one of each, or none
    categories: Sequence[str] = ()  # of its prompt; "" has none
    # "stages" of `JOB`, in words "made by"; each one's "guidance" and "aug_level".
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_samples(folder: str) -> list[Samples]:
    """The pictures in a folder of `sample`, those of the same values together.

    Of a folder without `LINES`, all PNG files and no captions. `UserError` when there
    are none, or not those that `JOB` asks for, in order.
    """
    root = pathlib.Path(folder)
    if not (root / LINES).exists():
        if not (files := sorted(root.glob("*.png"))):
            raise UserError(f"{folder!r} holds no PNG files: give a folder of `sample`")
        return [Samples(files)]
    wrong = f"{root / LINES} is not as `sample` writes it"
    lines = read_lines(root / LINES, "samples")
    lines = [parse_json(line.encode(), wrong) for line in lines]
    pairs = [(line.get("file"), line.get("prompt")) for line in lines]
    categories = [str(line.get("category", "")) for line in lines]
    if not (pairs and all(is_file_name(f) and isinstance(p, str) for f, p in pairs)):
        raise UserError(f"{wrong}: a line has a picture's file and its prompt")
    stages = _stages(root, pairs) if (root / JOB).exists() else {}
    groups = {}
    for line, pair, category in zip(lines, pairs, categories):
        values = {name: line.get(name) for name in ("guidance", "aug_level")}
        own = groups.setdefault(json.dumps(values), (values, []))[1]
        own.append((root / pair[0], pair[1], category))
    return [
        Samples(*map(list, zip(*own)), stages | values)
        for values, own in groups.values()
    ]


def _stages(root: pathlib.Path, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The stages of a job, all of whose pictures must be there, in order."""
    job = read_json(root / JOB, "what a job of `sample` was asked for", _JOB_BYTES)
    try:
        asked = job["asked"]
        each = range(asked["num_images"] * len(asked["values"]))
        prompts = [prompt for prompt in asked["prompts"] for _ in each]
        in_words = [_in_words(**stage) for stage in asked["stages"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{root / JOB} is damaged ({error!r}): sample again") from None
    wanted = [(f"{i:04d}.png", prompt) for i, prompt in enumerate(prompts)]
    for number, (pair, want) in enumerate(itertools.zip_longest(pairs, wanted), 1):
        if pair != want:
            raise UserError(
                f"{root / LINES} line {number} is of {pair!r:.99}, {JOB} asks for "
                f"{want!r:.99}: captions or pictures are missing, or of another order"
            )
    return {"made by": in_words, "stages": asked["stages"]}


def _in_words(config: Mapping[str, Any], checkpoint_step: int, **_: Any) -> str:
    sampler, decay = config["sampler"], config["optimizer"]["ema_decay"]
    made = f"{config['name']} at step {checkpoint_step}, EMA {decay}"
    return f"{made}, {sampler['name']} of {sampler['steps']} steps"


def read_pictures(files: Iterable[pathlib.Path]) -> Iterator[np.ndarray]:
    """`[S, S, 3]` uint8 of each file; a `UserError` unless all have one size."""
    shape = None
    for file in files:
        image = images.read(file)
        shape = shape or (len(image), len(image), 3)
        if image.shape != shape:
            raise UserError(
                f"{str(file)!r} has {image.shape[1]} by {image.shape[0]} pixels: the "
                f"samples are squares of one size, here {shape[0]}"
            )
        yield image


def measure(
    pictures: Iterable[np.ndarray], extractor: Extractor, name: str
) -> Statistics:
    """The features of pictures `[S, S, 3]` uint8, of which a batch is in memory.

    `UserError`, which calls the pictures `name`, when there are too few of them.
    """
    found, kept, hashes, size = None, bytearray(), [], 0
    for batch in batches(tqdm.tqdm(pictures, name, unit=" pictures")):
        features, size = extractor.run(batch), len(batch[0])
        own = distances.statistics(features)
        found = distances.merge(found, own) if found else own
        kept += features.tobytes()
        hashes += [hashlib.sha256(picture).digest() for picture in batch]
    if len(hashes) <= distances.NEIGHBOURS:
        raise UserError(f"{name}: {len(hashes)} pictures are too few to compare")
    # In no order: a reference may be shuffled.
    about = {f"{name}_sha256": _sha256(b"".join(sorted(hashes))), "size": size}
    features = np.frombuffer(kept, np.float32).reshape(-1, extractor.width)
    about |= extractor.about
    return dataclasses.replace(found, about=about, features=features)


def evaluate(
    samples: Samples,
    extractor: Extractor | None = None,
    reference: Statistics | None = None,
    clip: Clip | None = None,
    judge: Callable[[np.ndarray, str], tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Figures of samples and all that decides them, as JSON has it.

    With an extractor and a reference their distances; with a CLIP the CLIP score, and
    with a judge, who tells of a picture and its caption how much is asked for and how
    much of it is there, the share that is: both for each category, too.
    `UserError` when a picture is damaged or of another size, or captions are missing.
    """
    figures, about = {}, {"samples": len(samples.files)}
    if samples.captions:
        about["captions_sha256"] = _sha256("\n".join(samples.captions).encode())
    if extractor and reference:
        own = measure(read_pictures(samples.files), extractor, "samples")
        found = {"FD" if extractor.name else "FID": distances.frechet(own, reference)}
        if reference.features is not None:
            found |= distances.by_torch_fidelity(own.features, reference.features)
        of = f" ({extractor.name})" if extractor.name else ""
        figures |= {name + of: value for name, value in found.items()}
        known = {"reference": reference.n, **reference.about}
        for name in ("reference", "reference_sha256"):
            about[name] = known.get(name) or "unknown"
        about |= own.about
        if min(own.n, reference.n or own.n) <= (width := extractor.width):
            about["note"] = f"too few pictures for the covariance of {width} features"
    if (clip or judge) and not samples.captions:
        raise UserError("the samples have no captions, which these figures need")
    about |= clip.about if clip else {}
    figures |= _fit(samples, clip, judge)
    found = {"figures": figures, **about, **samples.made}
    if (clip or judge) and any(samples.categories):
        found["categories"] = {
            name: _fit(_of_category(samples, name), clip, judge)
            for name in dict.fromkeys(samples.categories)
        }
    return found


def _fit(
    samples: Samples, clip: Clip | None, judge: Callable | None
) -> dict[str, float]:
    """How well pictures fit their captions, by the names of the figures."""
    figures = {}
    if clip:
        figures |= clip_score(clip, read_pictures(samples.files), samples.captions)
    if judge:
        pictures = read_pictures(samples.files)
        asked, right = np.sum(list(map(judge, pictures, samples.captions)), axis=0)
        figures["judged right"] = float(right / asked)
    return figures


def _of_category(samples: Samples, name: str) -> Samples:
    rows = zip(samples.files, samples.captions, samples.categories)
    return Samples(*zip(*(row for row in rows if row[2] == name)))


def line(result: Mapping[str, Any]) -> str:
    """What `evaluate` found on one line, of hashes the beginning."""
    parts = [", ".join(f"{name} {v:.5g}" for name, v in result["figures"].items())]
    for name, value in result.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if name not in ("figures", "stages", "categories"):
            parts.append(f"{name} {value[:8] if name.endswith('sha256') else value}")
    return "; ".join(parts)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
