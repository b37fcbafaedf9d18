"""The fields of a config as `--help` lists them, with the comments of config.py."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any, Literal, get_args, get_origin

from imagen_jax.config import StageConfig


def describe(kind: type = StageConfig, path: str = "--config.") -> str:
    """Flag, default, what else it takes, and meaning of every field.

    A field's comment is above it or at the end of its line; what has none shares that
    of the field before it.
    """
    lines, meaning, text = inspect.getsource(kind).splitlines(), "", []
    nodes = ast.parse("\n".join(lines)).body[0].body
    places = {node.target.id: node for node in nodes if isinstance(node, ast.AnnAssign)}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            text.append(describe(field.type, f"{path}{field.name}."))
            continue
        start, end = places[field.name].lineno - 1, places[field.name].end_lineno - 1
        comments = [lines[end].partition("  # ")[2]]
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1
            comments.insert(0, lines[start].lstrip(" #"))
        meaning = " ".join(filter(None, comments)) or meaning
        head = f"  {path}{field.name}={field.default!r} {_takes(field.type)}"
        text += [head.rstrip(), textwrap.indent(textwrap.fill(meaning, 80), " " * 6)]
    return "\n".join(text)


def _takes(kind: Any) -> str:
    """The words or the interval of a field's type."""
    if get_origin(kind) is Literal:
        return "({})".format(" | ".join(get_args(kind)))
    inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return "".join(getattr(inner, "__metadata__", ()))
