"""Speed of the input pipeline for three stages, and the time of its parts.

python -m benchmarks.data --folder=FOLDER [--emoji=DIR] [--runs=3]

Draws JPEGs of 640 x 480 and of 1600 x 1200 (waves and grain, about as many bytes as
photographs), prepares them and the images of --emoji, and runs
`imagen_jax.benchmark --what=data` on each with a small network, as the input is what is
measured. Then one thread does the parts of the work for each stage one by one.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from imagen_jax.data import start_tensorflow
from imagen_jax.prepare import prepare

COUNT = 300
LARGE = 100
# Attention over pixels would not fit into memory at these sizes.
TINY = (
    "--config.model.channels=(8,16)",
    "--config.model.head_channels=8",
    "--config.model.self_attention=(False,False)",
    "--config.model.text_attention=(False,False)",
)
BASE = ("--config=configs/tiny.py:base", "--config.image_size=64", *TINY)
SR = ("--config=configs/tiny.py:sr", "--config.training.batch_size=8", *TINY)
MIDDLE = (*SR, "--config.image_size=256", "--config.lowres_size=64")
LAST = (*SR, "--config.image_size=1024", "--config.lowres_size=256")
LAST = (*LAST, "--config.crop_size=256")
# Name, source, --stored_size, flags of the stage.
CASES = (
    ("64, emoji of 128", "emoji", 0, BASE),
    ("64, JPEG 640 x 480", "small", 0, BASE),
    ("64, the same stored at 256", "small", 256, BASE),
    ("256, JPEG 640 x 480", "small", 0, MIDDLE),
    ("256, the same stored at 256", "small", 256, MIDDLE),
    ("1024, crop 256, JPEG 1600 x 1200", "large", 0, LAST),
    ("1024, crop 256, the same stored at 1024", "large", 1024, LAST),
)


def draw(folder: pathlib.Path, count: int, width: int, height: int) -> None:
    """Writes captioned JPEGs, unless the folder exists."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width][..., None] / height
    for i in range(count):
        pixels = np.full((height, width, 3), 128.0)
        for scale in (2, 5, 11, 23, 47, 97):
            a, b, phase = scale * random.normal(size=(3, 3))
            pixels += 60 / scale**0.5 * np.sin(a * x + b * y + phase)
        pixels += random.normal(0, 5, pixels.shape)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:04d}.jpg", quality=90)
        (folder / f"{i:04d}.txt").write_text(f"waves of number {i}")


def measure(records: str, stage: tuple[str, ...], folder: pathlib.Path, runs: int):
    """The reports of `runs` runs of the benchmark."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "imagen_jax.benchmark", "--what=data", *stage]
    command += [f"--config.data.records={records}", f"--json={report}", "--seconds=5"]
    command += ["--config.data.shuffle_examples=1000"]
    found = []
    for _ in range(runs):
        subprocess.run(command, check=True, capture_output=True)
        found.append(json.loads(report.read_text()))
    return found


def span(reports, name, form, factor=1):
    """A cell with the smallest and the largest value of the runs."""
    values = sorted(report[name] * factor for report in reports)
    return "-".join(dict.fromkeys(form.format(v) for v in (values[0], values[-1])))


def parts(records: str, size: int) -> list[float]:
    """Milliseconds of one thread for an image: to read, to decode too, all of it."""
    import tensorflow as tf

    from imagen_jax.data import preprocess
    from imagen_jax.data import records as tasks
    from imagen_jax.data.manifest import read_manifest

    task = tasks.make_task(records, read_manifest(records), size)
    rows = task.get_dataset(shuffle=False, try_in_mem_cache=False)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1

    def seconds(dataset):
        dataset = dataset.repeat(2).with_options(options)
        count, start = 0, time.process_time()
        for _ in dataset:
            count += 1
        return (time.process_time() - start) / count * 1000

    return [
        seconds(rows),
        seconds(rows.map(lambda row: preprocess.decode(row["image"]))),
        seconds(rows.map(lambda row: preprocess.picture(row["image"], size))),
    ]


def main() -> None:
    """Prints a table of the pipeline and one of its parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--emoji", default="")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    start_tensorflow()
    draw(args.folder / "small", COUNT, 640, 480)
    draw(args.folder / "large", LARGE, 1600, 1200)
    single = []
    print(
        "| stage | images/s | per core | step waits, ms | its share | queues, MiB |\n"
        "|---|---|---|---|---|---|"
    )
    for name, kind, stored, stage in CASES:
        source = args.emoji if kind == "emoji" else str(args.folder / kind)
        if not source:
            continue
        records = str(args.folder / f"records_{kind}_{stored}")
        options = {"text_length": 16, "stored_size": stored, "shard_examples": 100}
        prepare(f"folder:{source}", records, progress=False, **options)
        found = measure(records, stage, args.folder, args.runs)
        cells = [
            span(found, "images_per_second", "{:,.0f}"),
            span(found, "images_per_core_second", "{:,.0f}"),
            span(found, "wait_seconds_per_step", "{:.1f}", 1000),
            span(found, "share_of_the_step_waiting", "{:.1%}"),
            span(found, "queues_gib", "{:.0f}", 1024),
        ]
        print(f"| {' | '.join([name, *cells])} |", flush=True)
        size = int(name.partition(",")[0])
        read, decode, picture = parts(records, size)
        single.append(
            f"| {name} | {read:.2f} | {decode - read:.2f} | {picture - decode:.2f} |"
        )
    print("\n| ms of one thread | reading | decoding | to the stage's size |")
    print("|---|---|---|---|", *single, sep="\n")


if __name__ == "__main__":
    main()
