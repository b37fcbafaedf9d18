"""What files are by their names: listed, sorted by kind, put together by name."""

import collections
import heapq
import os
import posixpath
import re
from collections.abc import Iterable

from imagen_jax.preparing.sources import Problem

# Endings of pictures' files.
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
# What is counted of files that are neither used nor in the quarantine.
HIDDEN, FOLDERS = "hidden", "folders"


def ending(name: str) -> str:
    """The last ending of a name in small letters, ".png"; "" if it has none."""
    return posixpath.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a path, or a folder on it, has a name that begins with a dot."""
    parts = set(name.split("/")) - {".", ".."}
    return any(part.startswith(".") for part in parts)


def kind_of(name: str) -> str:
    """As what a file is counted that is passed over: by its ending."""
    return ending(name) if re.fullmatch(r"\.\w{1,12}", ending(name)) else "other"


def list_files(
    root: str | os.PathLike,
) -> tuple[list[str], list[Problem], collections.Counter]:
    """All files of a folder and its subfolders by their paths below it, with "/".

    Links are followed. Each folder is read once, under its own name if that lies below
    the root; other links to it, as loops are made of, are among the problems. Hidden
    files are counted, and so are those of hidden folders.
    """
    files, problems, hidden = [], [], 0
    top, seen = os.path.realpath(root), set()
    own, links = [""], []
    while own or links:
        # Links come when all that lies below has been read under its own name.
        below = own.pop() if own else heapq.heappop(links)
        real = os.path.realpath(os.path.join(root, below))
        if real in seen or f"{top}/".startswith(f"{real.rstrip('/')}/") and seen:
            problems.append(Problem(below, f"leads to {real}, which is read anyway"))
            continue
        seen |= set() if is_hidden(below) else {real}
        try:
            inside = os.listdir(real)
        except OSError as error:
            problems.append(Problem(below, f"cannot be read: {error.strerror}"))
            continue
        for path in (os.path.join(below, name) for name in inside):
            full = os.path.join(root, path)
            is_folder = os.path.isdir(full)
            if is_folder and not os.path.islink(full):
                own.append(path)
            elif is_hidden(path):
                hidden += 1
            elif is_folder:
                heapq.heappush(links, path)
            elif os.path.isfile(full):
                files.append(path)
            else:
                problems.append(Problem(path, "is no file, nor a link to one"))
    return sorted(files), problems, collections.Counter({HIDDEN: hidden})


def sort_out(
    names: Iterable[str], texts: tuple[str, ...]
) -> tuple[list[tuple[str, str, int]], list[Problem], collections.Counter]:
    """Pictures and the texts beside them, by names that differ in the ending only.

    `texts` are endings of texts; of several beside a picture the first one is taken.
    Pictures of one name share it. Without `texts` pictures stand alone.

    Returns:
      (picture, text or "", files that the two are) of each picture; what has no
      partner; and all other files, counted by kind.
    """
    stems, problems, others = {}, [], collections.Counter()
    for name in names:
        kind = ending(name)
        if kind not in IMAGES + texts:
            others[kind_of(name)] += 1
            continue
        images, found = stems.setdefault(posixpath.splitext(name)[0], ([], {}))
        if kind in IMAGES:
            images.append(name)
        elif kind in found:
            problems.append(Problem(name, f"is a second {kind} of its name"))
        else:
            found[kind] = name
    pairs = []
    for images, found in stems.values():
        taken, *more = [found[kind] for kind in texts if kind in found] or [""]
        if not images:
            reason = "has a caption, but there is no such picture"
            problems.append(Problem(taken, reason, len(found)))
        elif texts and not taken:
            reason = f"has no {' or '.join(texts)} file beside it"
            problems += [Problem(name, reason) for name in images]
        else:
            others.update(map(kind_of, more))
            files = [1 + bool(taken), *[1] * (len(images) - 1)]
            pairs += [(name, taken, n) for name, n in zip(images, files)]
    return pairs, problems, others
