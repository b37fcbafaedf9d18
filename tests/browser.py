"""Chromium without a window, told what to do through a pipe (DevTools protocol)."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium")

# The browser reads what it is told from 3 and answers on 4.
_START = 'exec "$@" 3<&"$READ" 4>&"$WRITE"'


class Page:
    """A page: what is on it, and what a person does with it."""

    def __init__(self, read: int, write: int, width: int, height: int, downloads):
        self._read, self._write, self._rest = read, write, b""
        self._downloads = downloads
        self._numbers, self._session = itertools.count(1), {}
        self._run(
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(downloads),
        )
        target = self._run("Target.createTarget", url="about:blank")["targetId"]
        session = self._run("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": session["sessionId"]}
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self._run("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)

    def _run(self, method: str, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._read, 2**20)
            one, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def open(self, address: str) -> None:
        """Opens an address and waits until all of it is there."""
        self._run("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:'")

    def value(self, script: str):
        """What an expression of JavaScript is."""
        found = self._run("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Waits until it is true."""
        deadline = time.monotonic() + 30
        while not self.value(script):
            assert time.monotonic() < deadline, script
            time.sleep(0.005)

    def click(self, element: str) -> None:
        """Clicks in the middle of an element, with the mouse."""
        middle = (
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
            f"(document.querySelector({element!r}).getBoundingClientRect())"
        )
        x, y = self.value(middle)
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self._run("Input.dispatchMouseEvent", type=kind, **at)

    def press(self, key: str) -> None:
        """Presses a key of the keyboard."""
        for kind in ("keyDown", "keyUp"):
            self._run("Input.dispatchKeyEvent", type=kind, key=key)

    def type(self, text: str) -> None:
        """Writes where the cursor is."""
        self._run("Input.insertText", text=text)

    def download(self, element: str):
        """Clicks on what gives a file; the file, when all of it is there."""
        before = set(self._downloads.glob("*.json"))
        self.click(element)
        deadline = time.monotonic() + 30
        while not (new := set(self._downloads.glob("*.json")) - before):
            assert time.monotonic() < deadline, list(self._downloads.iterdir())
            self.value("0")  # what the browser tells has to be read
            time.sleep(0.01)
        return new.pop()

    def screenshot(self, path) -> None:
        """Writes a PNG of what is seen."""
        data = self._run("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def opened(profile, width: int = 1200, height: int = 900):
    """A page, in a browser whose profile and downloads are below a new folder."""
    told, write = os.pipe()
    read, answered = os.pipe()
    command = [BROWSER, "--headless", "--no-sandbox", "--remote-debugging-pipe"]
    command += ["--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    with subprocess.Popen(
        ["bash", "-c", _START, "bash", *command],
        env={**os.environ, "READ": str(told), "WRITE": str(answered)},
        pass_fds=(told, answered),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(told)
        os.close(answered)
        try:
            yield Page(read, write, width, height, profile / "downloads")
        finally:
            os.close(write)  # which ends it
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            os.close(read)
