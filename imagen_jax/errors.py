"""The exceptions that a user is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: says what is wrong, where, and what to do.

    Doors print it as one line and exit with status 1; no traceback.
    """


class Stopped(Exception):
    """The run was asked to stop, and saved itself; doors exit with status 3."""


class PeerLost(Exception):
    """Another process of this training did not come or is gone; status 4.

    The same command, given again on all hosts, goes on.
    """


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the nearest allowed word, or ""."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
