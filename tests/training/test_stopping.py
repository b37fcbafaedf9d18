"""What asks a run to leave: signals, a second one, and notices of maintenance."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import jax
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.errors import Stopped
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop, maintenance
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.stopping import Stopping, stopping
from tests import tiny

# Minutes in one call of C, during which no handler of Python's runs.
BUSY = """
import hashlib
from imagen_jax.training.stopping import stopping
with stopping():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_whatever_the_main_thread_does(number):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BUSY], **streams) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert told.strip().startswith("error: a second signal: left at once")


def test_handlers_are_those_from_before_again():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stopping() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2) and stop.why == "a signal"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


class Server(http.server.ThreadingHTTPServer):
    """Answers as Compute Engine's metadata server does, on this machine."""

    daemon_threads = True

    def __init__(self, **values):
        self.values = {k.replace("_", "-"): v for k, v in values.items()}
        self.changed = threading.Condition()
        self.asked = []
        super().__init__(("localhost", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def host(self):
        return f"localhost:{self.server_port}"

    def set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(query))
        key = path.removeprefix("/computeMetadata/v1/instance/")
        server = self.server
        with server.changed:
            server.asked.append((key, query))
            server.changed.notify_all()
            if query.get("wait_for_change") == "true":
                server.changed.wait_for(
                    lambda: server.values[key] != query["last_etag"],
                    int(query["timeout_sec"]),
                )
            value = server.values[key]
        allowed = self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if allowed else 403)
        self.send_header("ETag", value)
        self.end_headers()
        self.wfile.write(value.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server(preempted="FALSE", maintenance_event="NONE") as found:
        monkeypatch.setenv("GCE_METADATA_HOST", found.host)
        yield found
        found.shutdown()


def until_waiting(server, count):
    """Until `count` requests that wait have come, since the start."""
    with server.changed:
        assert server.changed.wait_for(
            lambda: sum(bool(query) for _, query in server.asked) >= count, 60
        )


def test_a_notice_of_preemption_saves_and_stops(server, tmp_path, no_arithmetic):
    cfg = tiny.with_steps(tiny.stage(model=tiny.ONE_LEVEL), 10**6)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batches = tiny.Batches(cfg, mesh)

    def preempt(taken):
        if taken == 3:
            until_waiting(server, 2)
            server.set("preempted", "TRUE")

    batches.hook = preempt
    with pytest.raises(Stopped) as stopped:
        loop.train(cfg, str(tmp_path), batches, mesh)
    told = str(stopped.value)
    assert told.startswith("stopped on the notice preempted TRUE at step ")
    step = int(told.split("at step ")[1].split(",")[0])
    assert Checkpointer(str(tmp_path)).newest() == step >= 3


def test_only_what_ends_the_machine_is_a_notice(server):
    said, came = [], threading.Event()

    def notice(why):
        said.append(why)
        came.set()

    with maintenance.watched(notice):
        until_waiting(server, 2)
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        until_waiting(server, 3)
        server.set("maintenance-event", "NONE")
        until_waiting(server, 4)
        assert not said
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        assert came.wait(60)
        assert said == ["the notice maintenance-event TERMINATE_ON_HOST_MAINTENANCE"]
        # One is enough.
        server.set("preempted", "TRUE")
    assert len(said) == 1


def test_what_stood_there_before_the_run_does_not_end_it(server):
    """Else a run that is started again on the same machine would end at once."""
    said = []
    server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    with maintenance.watched(said.append):
        until_waiting(server, 2)
        server.set("maintenance-event", "NONE")
        until_waiting(server, 3)
    assert not said


def test_a_server_that_is_not_there_is_asked_again(server, monkeypatch):
    """And never ends a run by itself."""
    monkeypatch.setattr(maintenance, "_RETRY_SECONDS", 0.01)
    ask, fail, said, came = maintenance._ask, [OSError(), OSError()], [], []

    def flaky(*args):
        if fail:
            raise fail.pop()
        came.append(args)
        return ask(*args)

    monkeypatch.setattr(maintenance, "_ask", flaky)
    with maintenance.watched(said.append):
        until_waiting(server, 2)
    assert came and not said


def test_where_there_is_no_server_none_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    product = tmp_path / "product_name"
    monkeypatch.setattr(maintenance, "_PRODUCT", product)
    monkeypatch.setattr(maintenance, "_ask", None)
    threads = threading.active_count()
    for name in (None, "20XWCTO1WW"):
        if name:
            product.write_text(f"{name}\n")
        assert maintenance.server() is None
        with maintenance.watched(None):
            assert threading.active_count() == threads
    product.write_text("Google Compute Engine\n")
    assert maintenance.server() == "metadata.google.internal"


def test_one_process_of_several_tells_the_others(monkeypatch):
    """JAX takes SIGTERM, and makes all stop at one step."""
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    stop = Stopping()
    stop.notice("a notice")
    assert sent == [(os.getpid(), signal.SIGTERM)] and stop.why == "a notice"
