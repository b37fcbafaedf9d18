"""Pictures that look alike, found by a hash of how brightness rises and falls.

64-bit hashes that differ in at most `NEAR` bits agree in at least `_KEPT` of
`NEAR + _KEPT` blocks of bits. So for every choice of `_KEPT` blocks the hashes are
sorted by these, and only equal neighbours are compared: 35 sorts and few comparisons
in place of all pairs. Source: Manku, Jain, Das Sarma, WWW 2007, section 3.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image

NEAR = 4  # bits; a picture that is resized or encoded again rarely differs in more
_KEPT = 3
# Block b has every seventh bit, from all over the picture: margins are alike in many.
_BLOCKS = [
    np.uint64(sum(1 << i for i in range(b, 64, NEAR + _KEPT)))
    for b in range(NEAR + _KEPT)
]
# Neighbours in one order that a hash is compared with; of more alike some are missed.
_MOST_NEIGHBOURS = 256


def dhash(image: Image.Image) -> int:
    """Whether each of 8 x 8 pixels is darker than the one to its right, in 64 bits.

    Source: https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


def near_pairs(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Places `[n, 2]` of `hashes` `[N]` uint64 that are near each other.

    The arrays together have every pair once; but where more than 256 hashes agree in
    three blocks only some of those among them.
    """
    for kept in itertools.combinations(range(len(_BLOCKS)), _KEPT):
        keys = hashes & np.bitwise_or.reduce([_BLOCKS[b] for b in kept])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.arange(len(keys))
        for step in range(1, _MOST_NEIGHBOURS):
            first = first[first < len(keys) - step]
            first = first[keys[first] == keys[first + step]]
            if not len(first):
                break
            a, b = order[first], order[first + step]
            differ = hashes[a] ^ hashes[b]
            is_new = np.bitwise_count(differ) <= NEAR
            # Another choice of blocks has found it if one before these agrees, too.
            for other in set(range(kept[-1])) - set(kept):
                is_new &= differ & _BLOCKS[other] != 0
            yield np.stack([a, b], axis=1)[is_new]
