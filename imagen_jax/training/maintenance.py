"""Compute Engine's notices that this machine is about to go.

Its metadata server tells of a preemption about 30 seconds ahead, of maintenance that
ends the machine up to an hour (cloud.google.com/compute/docs/metadata).
"""

import contextlib
import http.client
import os
import pathlib
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

# What firmware calls the machine; google-auth looks there too.
_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
_HOST = "metadata.google.internal"
# Of each key under instance/ the values that mean the end. A machine that migrates
# goes on.
_ENDS = {
    "preempted": ("TRUE",),
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",),
}
# The server answers when a value changes, and after so long in any case.
_WAIT_SECONDS = 60
_RETRY_SECONDS = 10.0
_LONGEST_ANSWER = 1000


def server() -> str | None:
    """The host of the metadata server; None where there is none. Asks no network."""
    host = os.environ.get("GCE_METADATA_HOST")
    if host:
        return host
    try:
        return _HOST if _PRODUCT.read_text().startswith("Google") else None
    except OSError:
        return None


@contextlib.contextmanager
def watched(notice: Callable[[str], None]) -> Iterator[None]:
    """Calls `notice`, from another thread and at most once, with what is coming.

    What stood there from the start is no news: it has ended a run on this machine
    already, which may go on until the machine does.

    Args:
      notice: takes a few words.
    """
    host, ended, said = server(), threading.Event(), threading.Lock()

    def watch(key: str) -> None:
        value, etag = None, ""
        while not ended.is_set():
            try:
                found, etag = _ask(host, key, etag)
            # A server that is busy, or about to go with its machine.
            except (OSError, http.client.HTTPException):
                ended.wait(_RETRY_SECONDS)
                continue
            if not etag:
                ended.wait(_RETRY_SECONDS)
            new = value not in (None, found)
            value = found
            if new and found in _ENDS[key] and not ended.is_set():
                if said.acquire(blocking=False):
                    why = f"the notice {key} {found}"
                    print(f"\n{why}: saving", file=sys.stderr, flush=True)
                    notice(why)
                return

    if host:
        for key in _ENDS:
            threading.Thread(target=watch, args=(key,), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _ask(host: str, key: str, etag: str) -> tuple[str, str]:
    """The value of a key and its tag; when `etag` is given, once it has changed."""
    url = f"http://{host}/computeMetadata/v1/instance/{key}"
    if etag:
        url += f"?wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={etag}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # Through no proxy: the server is on this machine's own link.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=2 * _WAIT_SECONDS) as answer:
        value = answer.read(_LONGEST_ANSWER).decode("utf8", "replace").strip()
        return value, answer.headers.get("ETag", "")
