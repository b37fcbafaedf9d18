"""What `goodput` finds of a run with scripted stalls, a kill and a restart.

python -m benchmarks.goodput

Trains a small stage on random batches for 240 steps: a checkpoint every 40 steps, a
preview every 60, a log line each step. Every 30th batch sleeps, previews only sleep and
saving sleeps first, all when the device is done. Before step 188 the process kills
itself with SIGKILL; three seconds later it is started again. The sleepers write down
how long they took, and that is printed beside what `goodput` finds.
"""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
STEPS, KILLED, SAVES, PREVIEWS, WAITS = 240, 188, 40, 60, 30
WAIT, SAVE, PREVIEW, DOWN = 1.5, 0.75, 1.0, 3.0


def train(folder, kills):
    """The run; `kills` says whether it kills itself."""
    import jax

    from imagen_jax import benchmark, config
    from imagen_jax.configs import tiny
    from imagen_jax.sharding import make_mesh
    from imagen_jax.training import loop
    from imagen_jax.training.checkpoint import Checkpointer

    values = tiny.base()
    values.model.update(channels=(32,), num_res_blocks=(1,))
    values.model.update(self_attention=(True,), text_attention=(True,))
    values.training.update(
        steps=STEPS,
        log_every_steps=1,
        checkpoint_every_steps=SAVES,
        sample_every_steps=PREVIEWS,
    )
    cfg = config.from_dict(values.to_dict())
    mesh = make_mesh(cfg.mesh)
    batch = benchmark.random_batch(cfg, mesh)
    truth = open(folder / "truth.jsonl", "a", buffering=1)  # noqa: SIM115

    def tell(what, seconds):
        truth.write(json.dumps([what, seconds]) + "\n")

    def timed(what, function, *args):
        begun = time.monotonic()
        result = function(*args)
        tell(what, time.monotonic() - begun)
        return result

    class Batches(Iterator):
        taken = 0

        def __next__(self):
            self.taken += 1
            if kills and self.taken == KILLED:
                tell("down", -time.monotonic())
                os.kill(os.getpid(), signal.SIGKILL)
            if self.taken % WAITS == 0:
                jax.block_until_ready(newest)
                timed("input_wait", time.sleep, WAIT)
            return batch

        def get_state(self):
            return b"%d" % self.taken

        def set_state(self, state):
            self.taken = int(state)

    save, wait = Checkpointer.save, Checkpointer.wait
    compile_step = loop.compile_train_step
    previews, newest = [], []

    def slow_save(self, *args):
        jax.block_until_ready(args[0])
        timed("checkpoint", lambda: (time.sleep(SAVE), save(self, *args)))

    def preview(cfg, workdir, state, *args):
        jax.block_until_ready(state)
        timed("evaluation" if previews else "compile", time.sleep, PREVIEW)
        previews.append(None)

    def compile_train_step(*args):
        step = timed("compile", compile_step, *args)
        calls = iter(["compile"])

        def run(*args):
            first = next(calls, None)
            newest[:] = timed(first, step, *args) if first else step(*args)
            return tuple(newest)

        return run

    Checkpointer.save = slow_save
    Checkpointer.wait = lambda self: timed("checkpoint", wait, self)
    loop.save_preview, loop.compile_train_step = preview, compile_train_step
    tell("down", 0.0 if kills else time.monotonic())
    loop.train(cfg, str(folder / "run"), Batches(), mesh, lambda: batch)


def main():
    """Prints a row per bucket: seconds scripted, found, and their difference."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for number in ("first", "second"):
            command = [sys.executable, "-m", "benchmarks.goodput", number, name]
            done = subprocess.run(command, check=False, cwd=ROOT)
            want = -signal.SIGKILL if number == "first" else 0
            assert done.returncode == want, done.returncode
            time.sleep(DOWN if number == "first" else 0)
        truth = collections.Counter()
        for line in (folder / "truth.jsonl").read_text().splitlines():
            what, seconds = json.loads(line)
            truth[what] += seconds
        report = folder / "report.json"
        door = [sys.executable, "-m", "imagen_jax.goodput", f"--workdir={folder}/run"]
        subprocess.run([*door, f"--json={report}"], check=True, cwd=ROOT)
        found = json.loads(report.read_text())
    print("\n| bucket | scripted | found | |\n|---|---|---|---|")
    for bucket, seconds in found["seconds"].items():
        want, off = truth.get(bucket), ""
        if want:
            off = f"{seconds / want - 1:+.1%}"
        print(
            f"| {bucket} | {f'{want:.2f}' if want else '-'} | {seconds:.2f} | {off} |"
        )
    print(f"| steps lost | {KILLED - 1 - (KILLED - 1) // SAVES * SAVES} ", end="")
    print(f"| {found['steps_lost']} | |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(pathlib.Path(sys.argv[2]), kills=sys.argv[1] == "first")
    else:
        main()
