"""Errors that users are meant to read, and the reader of small JSON files."""

import difflib
import json
import os
from collections.abc import Iterable
from typing import Any

from etils import epath


class UserError(ValueError):
    """Bad input: says what is wrong, where, and what to do.

    Doors print it as one line and exit with status 1; no traceback.
    """


class Stopped(Exception):
    """The run was asked to stop, and has saved its state; doors exit with status 3."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the nearest allowed word, or ""."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """The object in a small JSON file, local or in a bucket.

    `UserError`, which calls the file `what` ("the config of a run"), when it is missing
    or does not hold a JSON object.
    """
    try:
        values = json.loads(epath.Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it should hold {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not {what}: it holds no JSON object")
    return values
