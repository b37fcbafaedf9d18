"""Whether a long run needs more and more memory, threads or open files.

python -m benchmarks.leaks [--steps=2000] [--every=N] [--prompts=1000]

Trains configs/tiny.py:base on drawn shapes, with a checkpoint every 20 steps and a
preview every 50, or both every N, then samples it, and prints what each process holds
in every tenth of its time: the median of what /proc says each second.
"""

import argparse
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

PARTS = 10


def held(pid: int) -> tuple[int, int, int]:
    """MiB of memory of its own, threads and open files of a process."""
    folder = pathlib.Path("/proc", str(pid))
    status = (folder / "status").read_text()
    kib, threads = (
        int(re.search(rf"{name}:\s+(\d+)", status)[1])
        for name in ("RssAnon", "Threads")
    )
    return kib // 1024, threads, len(list((folder / "fd").iterdir()))


def watch(door: str, *arguments: str) -> list[tuple[int, int, int]]:
    """What a door's process holds, second by second until it ends."""
    command = [sys.executable, "-m", f"imagen_jax.{door}", *arguments]
    seen = []
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            try:
                seen.append(held(process.pid))
            except (OSError, TypeError):  # it has just ended
                break
            time.sleep(1)
    if process.returncode:
        sys.exit(f"{door} ended with status {process.returncode}")
    return seen


def table(title: str, seen: list[tuple[int, int, int]]) -> str:
    """The medians of each tenth."""
    lines = [
        f"{title}: {len(seen)} s",
        f"{'part':>6}{'MiB':>8}{'threads':>9}{'files':>7}",
    ]
    for k in range(PARTS):
        part = seen[k * len(seen) // PARTS : (k + 1) * len(seen) // PARTS]
        memory, threads, files = (round(statistics.median(x)) for x in zip(*part))
        lines.append(f"{k + 1:6}{memory:8,}{threads:9}{files:7}")
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        records, run = folder / "records", folder / "run"
        source = ["--source=shapes:2000", "--image_size=32", "--text_length=16"]
        watch("prepare", *source, f"--output={records}")
        trained = watch(
            "train",
            *("--config=configs/tiny.py:base", f"--workdir={run}"),
            f"--config.data.records={records}",
            f"--config.training.steps={args.steps}",
            f"--config.training.checkpoint_every_steps={args.every or 20}",
            f"--config.training.sample_every_steps={args.every or 50}",
            "--config.training.log_every_steps=10",
        )
        print(table(f"{args.steps} steps", trained), flush=True)
        prompts = folder / "prompts.txt"
        lines = (f"a red circle above {i} blue squares\n" for i in range(args.prompts))
        prompts.write_text("".join(lines))
        output = f"--output={folder / 'samples'}"
        sampled = watch("sample", f"--stage={run}", f"--prompts={prompts}", output)
        print(table(f"{args.prompts} prompts", sampled))


if __name__ == "__main__":
    main()
