"""A cloud of folders: fake gcloud, kubectl, srun and scontrol that record their calls.

A slice is a folder with a file `state` and one folder for each worker, which is the
home of what ssh runs there; that is really run. A test says how requests are answered
(`answers`) and what a training does (`train`).
"""

import contextlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = ("--name=a", "--config=configs/base64.py", "--workdir=gs://b/base")

needs_tools = pytest.mark.skipif(
    not all(map(shutil.which, ("git", "flock", "setsid", "curl"))),
    reason="needs git, util-linux and curl",
)

GCLOUD = r"""
import fcntl, json, os, pathlib, shutil, subprocess, sys

words = sys.argv[1:]
cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
with open(cloud / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(["gcloud", *words]) + "\n")
flags = dict(w[2:].split("=", 1) for w in words if w.startswith("--") and "=" in w)
kind, verb, *names = [w for w in words[2:] if not w.startswith("--")]
assert words[:2] == ["compute", "tpus"], words


def answer(key):
    # The next scripted answer to `key`: [status, text], or None.
    with open(cloud / "answers.json", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answers = json.load(file)
        left = answers.get(key, [])
        if not left:
            return None
        first = left.pop(0)
        file.seek(0)
        file.truncate()
        json.dump(answers, file)
    return first


def end(status, text=""):
    print(text, file=sys.stderr if status else sys.stdout)
    sys.exit(status)


def scripted(key):
    found = answer(key)
    if found:
        end(*found)


name = names[-1].split(":")[0] if verb == "scp" else names[0]
folder = cloud / "slices" / name
queued = cloud / "queued" / name
place = queued if kind == "queued-resources" else folder
if verb == "create":
    scripted("create")
    made = cloud / "made" / name
    made.parent.mkdir(exist_ok=True)
    number = int(made.read_text()) + 1 if made.exists() else 1
    made.write_text(str(number))
    if kind == "queued-resources":
        queued.mkdir(parents=True)
        (queued / "state").write_text("ACTIVE")
    folder.mkdir(parents=True)
    (folder / "number").write_text(str(number))
    (folder / "type").write_text(flags["accelerator-type"])
    (folder / "state").write_text("READY")
    for worker in range(2):
        (folder / str(worker)).mkdir()
elif verb == "delete":
    scripted("delete")
    found = place.exists()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(queued, ignore_errors=True)
    end(0 if found else 1, f"NOT_FOUND: resource {name} was not found")
elif verb == "describe":
    scripted(f"describe {kind}")
    if not place.exists():
        end(1, f"ERROR: NOT_FOUND: Resource {name} was not found")
    if "ipAddress" in flags["format"]:
        end(0, "10.0.0.1;10.0.0.2")
    if "acceleratorType" in flags["format"]:
        end(0, (folder / "type").read_text())
    end(0, (place / "state").read_text())
else:
    assert (folder / "state").read_text() == "READY", "ssh to a slice that is not ready"
    home = folder / flags["worker"]
    scripted(f"{verb} {flags['worker']}")
    if verb == "scp":
        shutil.copy(names[0], home / names[1].split(":")[1])
    else:
        assert verb == "ssh", words
        os.chdir(home)
        os.environ.update(HOME=str(home), FAKE_SLICE=str(folder), FAKE_NAME=name)
        os.environ["WORKER"] = flags["worker"]
        os.environ["NUMBER"] = (folder / "number").read_text()
        sys.exit(subprocess.run(["bash", "-c", flags["command"]]).returncode)
"""

# What a worker has as its Python: `-m venv` copies it, `-m imagen_jax.train` is a
# script of the test's.
PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$FAKE_CLOUD/python"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m imagen_jax.train") exec bash "$FAKE_CLOUD/train" "${@:3}" ;;
esac
"""

# Records its name, its words and, for kubectl, what it is given.
RECORDER = r"""
import json, os, pathlib, sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
name = pathlib.Path(sys.argv[0]).name
given = sys.stdin.read() if "--filename=-" in sys.argv else ""
with open(cloud / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\n")
(cloud / "given").write_text(given)
status, text = json.loads((cloud / "answers.json").read_text()).get(name, [0, ""])
print(text)
sys.exit(status)
"""

QUICK = {
    "LAUNCH_ZONE": "us-central2-b",
    "LAUNCH_POLL_SECONDS": "0.1",
    "LAUNCH_RETRY_SECONDS": "0.01",
    "LAUNCH_RETRY_MAX_SECONDS": "0.03",
    "LAUNCH_RETRIES": "3",
    "LAUNCH_STOP_SECONDS": "2",
    "LAUNCH_SHORT_RUN_SECONDS": "100",
}


class Cloud:
    """The fake cloud in `folder`, and this repository's scripts, committed there."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / "cloud"
        self.repository = folder / "repository"
        self.bin = folder / "bin"
        for made in (self.folder, self.repository, self.bin):
            made.mkdir()
        self._program("gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        for name in ("kubectl", "srun", "scontrol"):
            self._program(name, f"#!{sys.executable} -IS\n{RECORDER}")
        for minor in (11, 12, 13):
            self._program(f"python3.{minor}", PYTHON)
        shutil.copytree(ROOT / "launch", self.repository / "launch")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message=all")
        self.answers({})
        self.train("exit 0")

    def _program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        done = subprocess.run(
            ["git", *who, *words],
            cwd=self.repository,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def answers(self, answers: dict) -> None:
        """Scripted answers: `{"create": [[1, "stderr"], ...], "ssh 1": ...}`."""
        (self.folder / "answers.json").write_text(json.dumps(answers))

    def train(self, script: str) -> None:
        """What a training does; knows $WORKER, $NUMBER (of the slice), $FAKE_SLICE."""
        (self.folder / "train").write_text(script)

    def run(self, script: str, *words: str, env=None, timeout: float = 60):
        """Runs launch/SCRIPT; its stdout and stderr are together in `stdout`."""
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            [self.repository / "launch" / script, *words],
            env={**os.environ, "FAKE_CLOUD": str(self.folder), "PATH": path}
            | QUICK
            | (env or {}),
            cwd=self.repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def calls(self, *words: str) -> list[list[str]]:
        """Recorded calls, without the program, that have all of `words` in order."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [row[1:] for row in rows if [w for w in row if w in words] == [*words]]

    def trainings(self) -> list[str]:
        """The arguments of every training that was started on a worker."""
        lines = (self.folder / "python").read_text().splitlines()
        return [line for line in lines if line.startswith("-m imagen_jax.train")]

    def slices(self) -> list[str]:
        """Slices that exist, and cost."""
        return sorted(p.name for p in (self.folder / "slices").glob("*"))


class MetadataServer(http.server.ThreadingHTTPServer):
    """Answers as Compute Engine's metadata server does, on this machine.

    Attributes:
      asked: the keys that were asked for, in order; with a "?" where the answer has to
        wait for a change.
    """

    daemon_threads = True

    def __init__(self):
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.asked: list[str] = []
        self._changed = threading.Condition()
        super().__init__(("localhost", 0), _Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def host(self) -> str:
        """For GCE_METADATA_HOST."""
        return f"localhost:{self.server_port}"

    def set(self, key: str, value: str) -> None:
        """The machine's owner decides."""
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def answer(self, key: str, waits: bool) -> str:
        """The value of a key, or what it changes to."""
        with self._changed:
            self.asked.append(key + "?" * waits)
            self._changed.notify_all()
            before = self.values[key]
            if waits:
                self._changed.wait_for(lambda: self.values[key] != before, 60)
            return self.values[key]

    def wait_until_asked(self, *keys: str) -> None:
        """Returns when all of `keys` were asked for."""
        with self._changed:
            assert self._changed.wait_for(lambda: {*keys} <= {*self.asked}, 60)


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        waits = "wait_for_change=true" in query
        allowed = self.headers["Metadata-Flavor"] == "Google"
        key = path.removeprefix("/computeMetadata/v1/instance/")
        value = self.server.answer(key, waits)
        self.send_response(200 if allowed else 403)
        self.end_headers()
        with contextlib.suppress(OSError):  # the one that asked may be gone
            self.wfile.write(value.encode())

    def log_message(self, *args):
        pass
