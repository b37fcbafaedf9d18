"""The app as browsers and scripts meet it, over HTTP and in Chromium."""

import http.client
import importlib.util
import io
import json
import logging
import os
import re
import signal
import socket
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from imagen_jax import app
from imagen_jax.api import desk
from imagen_jax.api.library import Cascade
from imagen_jax.errors import UserError
from tests import browser, tiny
from tests.api import fake
from tests.test_doors import call, error
from tests.test_sample import png_header

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="gradio is not installed: pip install '.[app]'",
)
OWN = [None, 2, "ddim", "dynamic", None] * 2  # the page's fields of two stages
SCRIPT = "<script>alert(1)</script> & <b>two</b> **squares**"


def refused(path, method="GET", **headers):
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return app.refusal({"path": path, "method": method, "headers": pairs})


def test_requests_that_the_page_does_not_make():
    assert not refused("/") and not refused("/gradio_api/file=/x/served/a.png")
    for path in (
        *("file=https://example.com/", "file=HTTP://example.com", "proxy=x"),
        *("deep_link", "process_recording", "monitoring", "run/", "file"),
    ):
        assert refused(f"/gradio_api/{path}") == refused(f"/{path}") == 404
    assert refused("/gradio_api/queue/join", "POST") == 411
    length = "content-length"
    assert not refused("/gradio_api/queue/join", "POST", **{length: "1000"})
    assert refused("/gradio_api/queue/join", "POST", **{length: "1000000"}) == 413
    assert not refused("/gradio_api/upload", "POST", **{length: "1000000"})
    assert refused("/gradio_api/upload", "POST", **{length: "100000000"}) == 413


def test_without_gradio_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = call("app", f"--stage={tmp_path}", f"--output={tmp_path}")
    assert done.returncode == 1 and "pip install 'imagen-jax[app]'" in error(done)


@needs_gradio
def test_the_door_serves_until_it_is_interrupted(tmp_path, monkeypatch):
    def interrupted():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}") as answer:
            assert b"imagen-jax" in answer.read()
        raise KeyboardInterrupt

    port = free_port()
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(app, "load_cascade", lambda *a, **k: fake.Cascade())
    # uvicorn's would have absl close what was stderr before `call`.
    monkeypatch.setattr(logging, "shutdown", lambda *_: None)
    monkeypatch.setattr(signal, "pause", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    done = call("app", "--stage=base", f"--output={tmp_path}", f"--port={port}")
    assert done.returncode == 3 and "interrupted" in error(done)
    assert f"the app is at http://127.0.0.1:{port}/" in done.stdout


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Served:
    """An app that is served to clients of HTTP."""

    def __init__(self, cascade, folder, most_waiting=20):
        import httpx

        self.desk = desk.Desk(cascade, folder, most_chars=60)
        self.page = app.page(self.desk, most_waiting)
        self.address = app.launch(self.page, port=free_port())
        self.http = httpx.Client(base_url=self.address, trust_env=False, timeout=60)
        self.numbers = {
            one["api_name"]: one["id"]
            for one in self.http.get("config").json()["dependencies"]
        }

    def join(self, user, name, *data):
        """Asks; the answer says whether it waits now."""
        body = {"data": data, "fn_index": self.numbers[name], "session_hash": user}
        return self.http.post("gradio_api/queue/join", json=body)

    def end(self, user):
        """What a user sees in the end."""
        to = {"session_hash": user}
        with self.http.stream("GET", "gradio_api/queue/data", params=to) as lines:
            for line in lines.iter_lines():
                if '"process_completed"' in line:
                    return json.loads(line.removeprefix("data:"))

    def ask(self, user, name, *data):
        assert self.join(user, name, *data).status_code == 200
        return self.end(user)

    def upload(self, data, name):
        """What the page's field has of a file."""
        answer = self.http.post("gradio_api/upload", files={"files": (name, data)})
        (path,) = answer.json()
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def picture(self, seen):
        """The last stage's file."""
        path = seen["output"]["data"][1]["path"]
        return self.http.get(f"gradio_api/file={path}").content


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Around a cascade that draws at once; which hosts were asked for meanwhile."""
    folder = tmp_path_factory.mktemp("app")
    hosts, look_up = [], socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
            patch.setenv(name, "")
        patch.setattr(desk, "_SECONDS", 0.05)
        patch.setattr(
            socket,
            "getaddrinfo",
            lambda h, *a, **k: hosts.append(h) or look_up(h, *a, **k),
        )
        running = Served(fake.Cascade(seconds=0.1), folder / "output", most_waiting=3)
        running.folder, running.hosts = folder, hosts
        yield running
        running.page.close(verbose=False)


@needs_gradio
def test_nothing_is_asked_of_the_network_but_a_port(served):
    text = served.http.get("").text
    assert served.hosts and set(served.hosts) <= {"127.0.0.1", "localhost"}
    policy = served.http.get("").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    assert '"analytics_enabled":false' in text.replace(" ", "")
    assert not served.page.share
    with pytest.raises(UserError, match="this port is taken"):
        app.launch(app.page(served.desk), port=served.page.server_port)


@needs_gradio
def test_no_file_but_its_own_is_served(served):
    secret = served.folder / "secret.txt"
    secret.write_text("a secret")
    kept = served.desk.folder / "kept.txt"
    kept.write_text("a secret")
    own = served.desk.served
    (own / "given.txt").write_text("given")

    def got(path):
        # As it is: httpx would resolve "..".
        line = http.client.HTTPConnection("127.0.0.1", served.page.server_port)
        line.request("GET", f"/{path}")
        answer = line.getresponse()
        return answer.status, answer.read()

    assert got(f"gradio_api/file={own}/given.txt") == (200, b"given")
    up = "../" * 12
    for path in (
        *("../../etc/passwd", "/etc/passwd", f"{up}etc/passwd", "/proc/self/environ"),
        *(secret, kept, f"{own}/../kept.txt", f"{own}/%2e%2e/kept.txt", own),
        *(secret.as_uri(), os.path.relpath(secret), "setup.py", f"{up[3:]}{secret}"),
    ):
        for route in ("gradio_api/file=", "gradio_api/file/", "static/", "assets/"):
            status, text = got(f"{route}{path}")
            assert status in (403, 404) and b"secret" not in text.replace(
                str(path).encode(), b""
            ), (route, path)
    # As a picture to enlarge, or as a prompt.
    for path in (str(secret), "/etc/passwd", "http://example.com/a.png"):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for name, inputs in (("enlarge", [given, "a circle"]), ("generate", [given])):
            seen = served.ask("thief", name, *inputs, 5, False, None, *OWN)
            assert not seen["success"] and "secret" not in json.dumps(seen)
            if path.startswith("http"):  # which is not fetched
                assert seen["output"]["error"] == "give a file, not its address"


@needs_gradio
def test_bad_uploads_are_told(served):
    for name, data, message in (
        ("a.txt", b"some text", "it is no picture of a known format"),
        ("a.png", b"", "this file is empty"),
        ("a.png", png_header(50_000, 50_000), "50,000 x 50,000 pixels"),
    ):
        given = served.upload(data, name)
        seen = served.ask("user", "enlarge", given, "a circle", 5, False, None, *OWN)
        assert not seen["success"] and message in seen["output"]["error"]
        assert "Traceback" not in json.dumps(seen)
    large = {"files": ("a.png", bytes(21 * 2**20))}
    assert served.http.post("gradio_api/upload", files=large).status_code == 413
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    given = served.upload(file.getvalue(), "a.png")
    seen = served.ask("user", "enlarge", given, "a circle", 5, False, None, *OWN)
    with Image.open(io.BytesIO(served.picture(seen))) as image:
        assert image.size == (16, 16)


@needs_gradio
def test_bad_requests_are_told_and_the_next_one_is_done(served):
    for prompt, seed, message in (
        ("x" * 61, 5, "at most 60"),
        ("", 5, "write a prompt"),
        ("a circle", -5, "whole number"),
        ("fail", 5, "this one failed"),
    ):
        seen = served.ask("user", "generate", prompt, seed, False, None, *OWN)
        assert not seen["success"] and message in seen["output"]["error"]
        assert "secret of the machine" not in json.dumps(seen)
    seen = served.ask("user", "generate", SCRIPT, 5, False, None, *OWN)
    assert seen["success"] and seen["output"]["data"][3:5] == ["seed 5", 5]
    with Image.open(io.BytesIO(served.picture(seen))) as image:
        assert image.info["prompt"] == SCRIPT
    assert served.desk.cascade.settings["sampler"] == ["ddim", "ddim"]
    # Past the queue, and a setting that is none of the page's.
    direct = {"data": ["a circle", 5, False, None, *OWN]}
    answer = served.http.post("gradio_api/run/generate", json=direct)
    assert answer.status_code >= 400
    odd = [None, 2, "own:../x", "dynamic", None] * 2
    seen = served.ask("user", "generate", "a circle", 5, False, None, *odd)
    assert not seen["success"]


@needs_gradio
def test_who_leaves_is_passed_over_and_more_than_wait_are_refused(served):
    cascade = served.desk.cascade
    cascade.asked.clear()
    cascade.gate.clear()
    try:
        request = "generate", "first", 5, False, None, *OWN
        assert served.join("first", *request).status_code == 200
        while not cascade.asked:
            pass
        for user in "abc":
            request = "generate", user, 5, False, None, *OWN
            assert served.join(user, *request).status_code == 200
        answer = served.join("d", *request)
        assert answer.status_code == 503 and "full" in answer.text
        to = {"session_hash": "b"}
        with served.http.stream("GET", "gradio_api/queue/data", params=to) as lines:
            next(lines.iter_lines())
    finally:
        cascade.gate.set()
    assert all(served.end(user)["success"] for user in ("first", "a", "c"))
    assert cascade.asked == ["first", "a", "c"]


@needs_gradio
@pytest.mark.slow
def test_twenty_at_once(tmp_path, monkeypatch):
    """None is lost, their order is kept, and the library makes the same bytes."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "")
    cascade, order = Cascade(tiny.untrained()), []
    sample = cascade.sample

    def noted(prompt, *args, **how):
        order.append(prompt)
        return sample(prompt, *args, **how)

    monkeypatch.setattr(cascade, "sample", noted)
    running = Served(cascade, tmp_path, most_waiting=20)
    prompts = [f"{i} circles" for i in range(20)]
    try:
        for seed, prompt in enumerate(prompts):
            request = "generate", prompt, seed, False, None, *OWN
            assert running.join(prompt, *request).status_code == 200
        pictures = [running.picture(running.end(prompt)) for prompt in prompts]
    finally:
        running.page.close(verbose=False)
    assert order == prompts and len(set(pictures)) == 20
    how = {"steps": 2, "sampler": "ddim", "threshold": "dynamic"}
    for seed, (prompt, data) in enumerate(zip(prompts, pictures)):
        (want,) = cascade(prompt, seed=seed, **how)
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(image, want)
            assert image.info == want.info


BUTTON = (
    "[...document.querySelectorAll('button')]"
    ".find(one => one.innerText.trim().startsWith({!r}))"
)
# The pictures of the stages that are shown, as addresses of files.
SHOWN = "[...document.querySelectorAll('.drawn img')].map(one => one.src)"
GIVE = """(() => {
  const files = new DataTransfer();
  files.items.add(new File(['some text'], 'a.png'));
  const field = document.querySelector('input[type=file]');
  field.files = files.files;
  field.dispatchEvent(new Event('change', {bubbles: true}));
})()"""


@needs_gradio
@browser.needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 1200])
def test_in_a_browser(served, tmp_path, width):
    def press(name):
        page.until(f"!!{BUTTON.format(name)}")
        page.value(f"{BUTTON.format(name)}.click()")

    with browser.opened(tmp_path, width, 900) as page:
        page.open(served.address)
        page.until(f"!!{BUTTON.format('Make a picture')}")
        page.value("window.alert = () => {window.alerted = true}")
        # The page moves while it is put together.
        while page.value("document.activeElement.tagName") != "TEXTAREA":
            page.click("textarea")
        page.type(SCRIPT)
        press("Make a picture")
        page.until(f"{SHOWN}.length === 1")
        first = page.value(SHOWN)
        page.until(f"{SHOWN}.length === 2 && document.body.innerText.includes('seed ')")
        assert first != page.value(SHOWN)[:1]
        seed = re.search(r"\nseed (\d+)\n", page.value("document.body.innerText"))[1]
        page.value("document.querySelector('.thumbnail-item').click()")
        line = f"seed {seed}: {SCRIPT}"
        lines = "[...document.querySelectorAll('textarea')].map(one => one.value)"
        page.until(f"{lines}.includes({json.dumps(line)})")
        assert page.value("document.querySelector('[type=checkbox]').checked")
        press("Use this seed")
        page.until("!document.querySelector('[type=checkbox]').checked")
        assert page.value("document.querySelector('[type=number]').value") == seed
        press("Enlarge a picture")
        page.until("!!document.querySelector('input[type=file]')")
        # A new field may not listen yet; one with a file is gone.
        while page.value("!!document.querySelector('input[type=file]')"):
            page.value(GIVE)
            time.sleep(0.5)
        press("Enlarge it, as the prompt says")
        page.until("document.body.innerText.includes('no picture of a known format')")
        assert not page.value("window.alerted")
        fits = "[innerWidth, document.documentElement.scrollWidth]"
        assert page.value(fits) == [width, width]
        loaded = "performance.getEntriesByType('resource').map(one => one.name)"
        assert all(one.startswith(served.address) for one in page.value(loaded))
