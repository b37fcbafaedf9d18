"""Seconds from the command to the first step, with an empty cache and with a full one.

python -m benchmarks.startup --records=RECORDS [--config=configs/tiny.py:base]

Runs `train` twice with one folder of compiled programs, which is empty at first, and
reads events.jsonl: when the state was there, when the first step had been compiled and
handed over, and how long later steps took.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

STEPS, LOGGED = 60, 20


def start(config: str, records: str, folder: pathlib.Path, name: str) -> list[float]:
    """Seconds to the state, to the first step, and of a later step."""
    workdir = folder / name
    command = [sys.executable, "-m", "imagen_jax.train", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.data.records={records}"]
    command += [f"--config.training.steps={STEPS}"]
    command += [f"--config.training.log_every_steps={LOGGED}"]
    command += ["--config.training.sample_every_steps=0"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    began = time.time()
    subprocess.run(command, env=os.environ | cache, check=True, capture_output=True)
    events = [json.loads(line) for line in (workdir / "events.jsonl").open()]
    at = {event["event"]: event["seconds"] - began for event in events}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rate = json.loads(lines[-1])["steps_per_second"]
    return [at["start"], at["compile"], 1 / rate]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", required=True)
    parser.add_argument("--config", default="configs/tiny.py:base")
    args = parser.parse_args()
    print(f"{'cache':8}{'state':>10}{'first step':>12}{'step':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty", "full"):
            times = start(args.config, args.records, pathlib.Path(folder), name)
            print(f"{name:8}{times[0]:8.1f} s{times[1]:10.1f} s{times[2]:8.3f} s")


if __name__ == "__main__":
    main()
