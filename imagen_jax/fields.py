"""The fields of a config as `--help` lists them, with the comments of config.py."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from imagen_jax.config import StageConfig


def describe() -> str:
    """Flag, default, what else it takes, and meaning of every field."""
    groups = {field.type: f"{field.name}." for field in dataclasses.fields(StageConfig)}
    text = []
    for kind, group in [(StageConfig, ""), *groups.items()]:
        if dataclasses.is_dataclass(kind):
            for field, meaning in _fields(kind):
                flag = f"--config.{group}{field.name}={field.default!r}"
                text.append(f"  {flag} {_takes(field.type)}".rstrip())
                text.append(textwrap.indent(textwrap.fill(meaning, 80), " " * 6))
    return "\n".join(text)


def _takes(kind: Any) -> str:
    """The words or the interval of a field's type."""
    if get_origin(kind) is tuple:
        return _takes(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "({})".format(" | ".join(get_args(kind)))
    return "".join(getattr(kind, "__metadata__", ()))


def _fields(kind: type) -> Iterator[tuple[dataclasses.Field, str]]:
    """The fields of a group and their comments: above them, or at the end of the line.

    What has none shares that of the field above it.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    lines, meaning = inspect.getsource(kind).splitlines(), ""
    for node in ast.parse("\n".join(lines)).body[0].body:
        name = node.target.id if isinstance(node, ast.AnnAssign) else ""
        if not name or dataclasses.is_dataclass(fields[name].type):
            continue
        start, end = node.lineno - 1, node.end_lineno - 1
        comments = [lines[end].partition("  # ")[2]]
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1
            comments.insert(0, lines[start].lstrip(" #"))
        meaning = " ".join(filter(None, comments)) or meaning
        yield fields[name], meaning
