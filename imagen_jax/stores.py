"""Where files are kept: on a disk, or in a bucket of Google Cloud Storage.

Every command asks here first. A store that is not there is then one `UserError` within
`_SECONDS`; the clients of buckets would try again for minutes, and take "file:///x" for
a folder "file:".
"""

import functools
import http.client
import re
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request

from etils import epath
from etils.epath import backend

from imagen_jax.errors import UserError

# All of it: some hosts have a dozen addresses, each of which may not answer.
_SECONDS = 20.0
_GOOGLE = "https://storage.googleapis.com"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):/+", re.I)
# In what clients of buckets raise, whose own types nothing here knows.
_OF_A_BUCKET = re.compile(r"\bgs://|storage\.googleapis|libcurl|CURL error")


def check_disk(path: str, instead: str = "a path of this machine") -> None:
    """Raises `UserError`, which tells what to give `instead`, for a path on no disk."""
    if found := _SCHEME.match(path):
        if found[1].lower() == "file":
            instead = repr("/" + path[found.end() :])
        raise UserError(
            f"{path!r} is in a store that is not used here ({found[1]}://): give "
            f"{instead}; copy what is elsewhere, or mount a bucket"
        )


def check_store(path: str) -> None:
    """Raises `UserError` unless `path` is on a disk, or in a bucket that answers.

    Whether there is anything at the path is not asked, nor who may read it.
    """
    found = re.match("gs://([^/]+)", path)
    if not found:
        check_disk(path, "a folder, or gs://BUCKET/FOLDER")
    elif reason := _reason(found[1]):
        raise UserError(f"{path!r}: the bucket {found[0]} {reason}")


def told(error: BaseException) -> str:
    """What a client of buckets says in an error, on one line; "" in any other error."""
    if isinstance(error, TypeError | AttributeError | LookupError | AssertionError):
        return ""  # faults of this program
    text = " ".join(str(error).split())[:500]
    return text if _OF_A_BUCKET.search(text) else ""


@functools.cache
def _reason(bucket: str) -> str:
    """Why a bucket cannot be used; "" when it can, or nobody knows."""
    answer = [f"no answer in {_SECONDS:.0f} s"]
    ask = threading.Thread(target=lambda: answer.append(_ask(bucket)), daemon=True)
    ask.start()
    ask.join(_SECONDS)
    reason = " ".join(str(answer[-1]).split())[:300]
    if reason in ("", "404", "400"):  # 400: no bucket can have this name
        return reason and "does not exist: create it, or correct its name"
    return f"cannot be reached ({reason}): look at the network, or give a folder"


def _ask(bucket: str) -> object:
    """A status of HTTP for a bucket that does not exist, or why it cannot be asked."""
    root, name = epath.Path(f"gs://{bucket}"), urllib.parse.quote(bucket, safe="")
    try:
        if getattr(root, "_backend", None) is not backend.tf_backend:
            root.exists()
        else:  # TensorFlow's client does not give up: first by a plain request.
            url = f"{_GOOGLE}/storage/v1/b/{name}?fields=name"
            urllib.request.urlopen(url, timeout=_SECONDS).close()
    except urllib.error.HTTPError as error:
        # Without a key: a bucket that is there refuses by 401.
        return error.code if error.code in (400, 404) else ""
    except (OSError, http.client.HTTPException, ImportError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # An answer, too: TensorFlow has certificates of its own.
        return "" if isinstance(reason, ssl.SSLCertVerificationError) else reason
    return ""
