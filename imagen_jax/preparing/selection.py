"""The picture half of `prepare`: what of a shard can be used, as it is stored."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator

from imagen_jax.preparing.images import BrokenPicture, Picture, Rules, verify
from imagen_jax.preparing.sources import Example, Problem

# Pictures that wait in memory for their turn.
_READ_AHEAD = 64


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An example that can be used, with its picture as it is stored."""

    id: int
    name: str
    caption: str
    picture: Picture


def select(
    items: Iterable[Example | Problem], rules: Rules
) -> Iterator[Chosen | Problem]:
    """Opens the pictures of `items`, several at a time; yields in their order."""

    def choose(item):
        if isinstance(item, Problem):
            return item
        try:
            picture = verify(item.read(), rules)
        except BrokenPicture as error:
            return Problem(item.name, str(error))
        except OSError as error:
            return Problem(item.name, f"cannot be read: {error.strerror or error}")
        return Chosen(item.id, item.name, item.caption, picture)

    return _parallel(choose, items)


def _parallel(function: Callable, items: Iterable) -> Iterator:
    # Executor.map would read all items ahead.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
