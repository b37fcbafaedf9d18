"""Measures samples: FID, KID, precision and recall, the CLIP score.

python -m imagen_jax.evaluate --samples=DIR --reference=DIR --weights=FILE \
    [--clip=FOLDER --preset=clean --json=FILE]

Prints one line, with all that decides the figures; for a folder in which `sample`
compared values, one for each, and --plot draws their trade-off. With --stage and the
other flags of `sample` the pictures are made first, where they are missing;

python -m imagen_jax.evaluate --watch=WORKDIR --prompts=FILE --samples=DIR ...

does so for each checkpoint of a training, beside it or afterwards, and its page shows
the figures. Nothing is downloaded. See docs/evaluation.md.
"""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from imagen_jax import cli, images, sample
from imagen_jax.api.cascade import checkpoints
from imagen_jax.data import manifest, memory, start_tensorflow
from imagen_jax.errors import UserError, printable
from imagen_jax.evaluation import alignment, distances, features, report, tradeoff
from imagen_jax.preparing import job, sources
from imagen_jax.preparing.settings import FORMS, Settings
from imagen_jax.shapes.judge import judge
from imagen_jax.stores import check_disk
from imagen_jax.training.metrics import EVALUATIONS, PAGE, draw_page

_POLL_SECONDS = 10.0


def stored(reference: str) -> Iterator[bytes]:
    """The files of the pictures of a folder, of records or of a source of `prepare`.

    `UserError` when there is no such thing, or a picture is damaged.
    """
    root = pathlib.Path(reference)
    if (root / report.LINES).exists():
        for samples in report.read_samples(reference):
            yield from map(images.png, report.read_pictures(samples.files))
    elif (root / manifest.FILE_NAME).exists():
        start_tensorflow()
        from imagen_jax.data.tfds import DataSource

        rows = DataSource(reference).get_dataset(shuffle=False)
        yield from (row["image"] for row in rows.as_numpy_iterator())
    elif root.is_file():
        found = memory.read(reference, manifest.read_manifest(reference))
        yield from map(images.png, found["image"])
    else:
        name = f"folder:{reference}" if root.is_dir() else reference
        asked = Settings(name, "-", no_captions=True)
        asked.check()
        source = job.open_source(asked)
        items = (item for shard in range(source.shards) for item in source.read(shard))
        for item in itertools.chain(source.problems, sources.verify_images(items)):
            if isinstance(item, sources.Problem):
                raise UserError(f"--reference: {item.name} {item.reason}")
            if not isinstance(item, sources.Rest):
                yield item[1].data


def open_reference(
    reference: str, extractor: features.Extractor, size: int
) -> distances.Statistics:
    """The statistics of a reference: stored ones, or its pictures' at a size."""
    if reference.endswith(".npz"):
        try:
            manifest.read_manifest(reference)
        except UserError:  # it is none of records
            about = {"size": size, **extractor.about}
            return distances.read_statistics(reference, extractor.width, about)
    preset = extractor.about["preset"]
    squares = (features.middle_square(f, size, preset) for f in stored(reference))
    return report.measure(squares, extractor, "reference")


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    sample.define_job()
    watch = "a workdir: each checkpoint is sampled to its folder in --samples"
    flags.DEFINE_string("watch", None, watch)
    flags.DEFINE_string("samples", None, "a folder of `sample`, or of PNG files")
    reference = "a folder of pictures or records, a .npz of records or statistics, or "
    flags.DEFINE_string("reference", "", reference + FORMS)
    flags.DEFINE_enum("preset", "imagen", [*features.FILTERS], "how it is resized")
    named = "inception, efficientnet-lite0 or a network of timm"
    flags.DEFINE_string("features", features.INCEPTION, named)
    flags.DEFINE_string("weights", "", "file of the weights of --features")
    flags.DEFINE_string("clip", "", "folder of a CLIP, for the CLIP score")
    judge = "of samples of drawn shapes: what the demo's judge finds right"
    flags.DEFINE_bool("judge", False, judge)
    plot = "draws alignment against distance to this .svg or .png"
    flags.DEFINE_string("plot", None, plot)
    flags.DEFINE_multi_string("compare", [], "a file of --json, drawn in the same plot")
    flags.DEFINE_string("statistics", None, "stores the reference's in this .npz")
    flags.DEFINE_string("json", None, "also write the results to this file")
    flags.mark_flag_as_required("samples")


@dataclasses.dataclass
class Measures:
    """What samples are measured by."""

    extractor: features.Extractor | None
    reference: distances.Statistics | None
    clip: alignment.Clip | None
    judge: Callable[[np.ndarray, str], tuple[int, int]] | None

    def of(self, folder: str) -> list[dict[str, Any]]:
        """Prints and returns the figures of each group of samples in a folder."""
        results = []
        for samples in report.read_samples(folder):
            by = self.extractor, self.reference, self.clip, self.judge
            results.append(found := report.evaluate(samples, *by))
            print(printable(report.line(found)), flush=True)
        return results


def judged(picture: np.ndarray, caption: str) -> tuple[int, int]:
    """How much the caption of a drawn scene asks for, and how much the judge finds."""
    verdict = dataclasses.astuple(judge(picture, caption))
    asked = [value for value in verdict if value is not None]
    return len(asked), sum(asked)


def open_measures(first: str) -> Measures:
    """What the flags name; `first` is a folder of samples, whose size counts."""
    args = flags.FLAGS
    extractor = reference = clip = None
    if args.reference:
        extractor = features.open_extractor(args.features, args.weights, args.preset)
        size = len(next(report.read_pictures(report.read_samples(first)[0].files)))
        reference = open_reference(args.reference, extractor, size)
        if args.statistics:
            distances.save_statistics(args.statistics, reference)
    if args.clip:
        clip = alignment.open_clip(args.clip)
    return Measures(extractor, reference, clip, judged if args.judge else None)


def watch(workdir: str) -> None:
    """Samples and measures each checkpoint of a training until its last step.

    Figures go to `EVALUATIONS` of the workdir, from which its page draws curves; what
    is there is not measured again.
    """
    args, folder = flags.FLAGS, epath.Path(workdir)
    file, measures = folder / EVALUATIONS, None
    args.stage = args.stage or [workdir]
    if workdir not in args.stage:
        raise UserError(f"--watch={workdir} is none of the stages of --stage")
    while True:
        lines = file.read_text().splitlines() if file.exists() else []
        done = {json.loads(line)["step"] for line in lines}
        cfg, steps = checkpoints(workdir)
        for step in sorted(steps - done):
            output = str(pathlib.Path(args.samples) / f"{step:08d}")
            job = sample.sample(output, {workdir: step})
            made = job.trained[args.stage.index(workdir)].step
            if made != step:  # damaged, or removed meanwhile
                raise UserError(f"checkpoint {step} of {workdir} cannot be read")
            measures = measures or open_measures(output)
            lines += [json.dumps({"step": step, **r}) for r in measures.of(output)]
            file.write_text("".join(f"{line}\n" for line in lines))
            page = draw_page(cfg, workdir, folder, max(steps))
            (folder / PAGE).write_text(page)
        if max(steps | done, default=0) >= cfg.training.steps:
            return
        time.sleep(_POLL_SECONDS)


def main() -> None:
    """Measures what the flags ask for."""
    args = flags.FLAGS
    for name in ("json", "statistics", "plot"):
        cli.check_json(args[name].value, name)
    check_disk(args.samples)
    if not (args.reference or args.clip or args.judge):
        raise UserError("nothing to measure: give --reference and --weights, or --clip")
    packages = ("torch", "torch_fidelity", "timm", "transformers", "matplotlib")
    for package in packages if args.reference or args.clip or args.plot else ():
        if not importlib.util.find_spec(package):
            raise UserError(f"no package {package}: pip install 'imagen-jax[eval]'")
    others = {pathlib.Path(p).stem: tradeoff.read_results(p) for p in args.compare}
    cli.join()
    if args.watch:
        watch(args.watch)
        return
    if args.stage:
        sample.sample(args.samples)
    if jax.process_index():
        return
    results = open_measures(args.samples).of(args.samples)
    cli.write_json(args.json, {"results": results})
    if args.plot:
        name = pathlib.Path(args.json or args.samples).stem
        tradeoff.draw(args.plot, {name: results} | others)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
