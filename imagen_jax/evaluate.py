"""Measures samples: FID, KID, precision and recall, the CLIP score.

python -m imagen_jax.evaluate --samples=DIR --reference=DIR --weights=FILE \
    [--clip=FOLDER --preset=clean --json=FILE]

Prints one line, with all that decides the figures; for a folder in which `sample`
compared values, one for each. Nothing is downloaded. See docs/evaluation.md.
"""

import importlib.util
import itertools
import pathlib
from collections.abc import Iterator

from absl import flags

from imagen_jax import cli, images
from imagen_jax.data import manifest, memory, start_tensorflow
from imagen_jax.errors import UserError, printable
from imagen_jax.evaluation import alignment, distances, features, report
from imagen_jax.preparing import job, sources
from imagen_jax.preparing.settings import Settings
from imagen_jax.stores import check_disk


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
    flags.DEFINE_string("samples", None, "a folder of `sample`, or of PNG files")
    reference = "a folder of pictures or records, a .npz of records or statistics, or "
    flags.DEFINE_string("reference", "", reference + sources.FORMS)
    flags.DEFINE_enum("preset", "imagen", [*features.FILTERS], "how it is resized")
    named = "inception, efficientnet-lite0 or a network of timm"
    flags.DEFINE_string("features", features.INCEPTION, named)
    flags.DEFINE_string("weights", "", "file of the weights of --features")
    flags.DEFINE_string("clip", "", "folder of a CLIP, for the CLIP score")
    flags.DEFINE_string("statistics", None, "stores the reference's in this .npz")
    flags.DEFINE_string("json", None, "also write the results to this file")
    flags.mark_flag_as_required("samples")


def main() -> None:
    """Measures what the flags ask for."""
    args = flags.FLAGS
    cli.check_json(args.json)
    cli.check_json(args.statistics, "statistics")
    check_disk(args.samples)
    if not (args.reference or args.clip):
        raise UserError("nothing to measure: give --reference and --weights, or --clip")
    for package in ("torch", "torch_fidelity", "timm", "transformers"):
        if not importlib.util.find_spec(package):
            raise UserError(f"no package {package}: pip install 'imagen-jax[eval]'")
    groups = report.read_samples(args.samples)
    extractor = reference = clip = None
    if args.reference:
        extractor = features.open_extractor(args.features, args.weights, args.preset)
        size = len(next(report.read_pictures(groups[0].files)))
        reference = open_reference(args.reference, extractor, size)
        if args.statistics:
            distances.save_statistics(args.statistics, reference)
    if args.clip:
        clip = alignment.open_clip(args.clip)
    results = []
    for samples in groups:
        results.append(report.evaluate(samples, extractor, reference, clip))
        print(printable(report.line(results[-1])))
    cli.write_json(args.json, {"results": results})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
