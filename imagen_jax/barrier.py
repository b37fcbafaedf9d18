"""Waiting for all processes of a training, but not for ever."""

import collections
import re

import jax
from jax._src import distributed

from imagen_jax.errors import PeerLost

# Twice what Orbax gives its own: before some of these a checkpoint is read.
_SECONDS = 600.0

_came: collections.Counter[str] = collections.Counter()


def wait_for_all(what: str, seconds: float = _SECONDS) -> None:
    """Returns when all processes are here, which all call this as often.

    Collectives have no deadline: a process that lives and does not come would be waited
    for as long as it lives. So this comes before them.

    Args:
      what: is to be done together, for the message.
      seconds: how long to wait.

    Raises:
      PeerLost: with the numbers of those that did not come.
    """
    client = distributed.global_state.client
    if client is None:
        return
    _came[what] += 1
    try:
        client.wait_at_barrier(f"{what} {_came[what]}", round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        missing = not_come(error)
        if not missing:
            raise
        raise PeerLost(
            f"{numbered(missing)} of {jax.process_count()} did not come within "
            f"{seconds:g} s to {what}; see the logs there. The same command resumes "
            "from the last checkpoint when all are back"
        ) from None


def not_come(error: jax.errors.JaxRuntimeError) -> list[int]:
    """The processes that an error of a barrier names."""
    _, _, names = str(error).partition("timed out task names:")
    return [int(n) for n in re.findall(r"^\D*?(?:task:)?(\d+)$", names, re.M)]


def numbered(processes: list[int]) -> str:
    """Words for some processes."""
    word = "process" if len(processes) == 1 else "processes"
    return f"{word} {', '.join(map(str, processes))}"
