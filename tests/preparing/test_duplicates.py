"""Hashes of looks against their definition; near pairs against a loop over all."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagen_jax.preparing import duplicates
from imagen_jax.preparing.duplicates import NEAR, dhash, near_pairs


def _picture(seed, side=96):
    """Smooth shapes and some noise, uint8 `[side, side * 5 / 4, 3]`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, : side * 5 // 4][..., None] / side
    waves = sum(
        rng.uniform(20, 60, 3)
        * np.sin(rng.uniform(2, 12) * x + rng.uniform(2, 12) * y + rng.uniform(0, 6))
        for _ in range(6)
    )
    noise = rng.normal(0, 4, waves.shape)
    return Image.fromarray((waves + noise + 128).clip(0, 255).astype(np.uint8))


def _encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def _lanczos(size, count):
    """`[count, size]` float64: the weights of a reduction by a Lanczos-3 kernel."""
    scale = size / count
    centres = (np.arange(count) + 0.5) * scale
    away = (np.arange(size) + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_hash_compares_neighbours_of_eight_rows_of_nine(seed):
    """The definition in float64; but for pixels that rounding could make equal."""
    # Of less contrast, or what rings beyond black and white would be clipped.
    image = _picture(seed).point(lambda value: value / 2 + 64)
    grey = np.asarray(image, float) @ [0.299, 0.587, 0.114]
    small = _lanczos(grey.shape[0], 8) @ grey @ _lanczos(grey.shape[1], 9).T
    rises = np.diff(small, axis=1)
    bits = [(dhash(image) >> (63 - i)) & 1 for i in range(64)]
    clear = np.abs(rises) > 2
    assert clear.mean() > 0.7
    np.testing.assert_array_equal(np.reshape(bits, (8, 8))[clear], (rises > 0)[clear])


def test_hashes_of_slopes():
    across = np.tile(np.arange(0, 180, 2, dtype=np.uint8), (80, 1))
    assert dhash(Image.fromarray(across)) == 2**64 - 1
    assert dhash(Image.fromarray(across[:, ::-1].copy())) == 0
    half = across.copy()
    half[40:] = 255 - half[40:]
    assert dhash(Image.fromarray(half)) == 2**64 - 2**32


@pytest.mark.parametrize("change", ["resized", "encoded", "corner"])
def test_what_was_changed_a_little_is_near_and_others_are_not(change):
    originals = [_picture(seed) for seed in range(40)]
    changed = []
    for image in originals:
        if change == "resized":
            changed.append(image.resize((50, 40), Image.Resampling.BICUBIC))
        elif change == "encoded":
            changed.append(_encoded(image, "JPEG", quality=60))
        else:
            image = image.copy()
            image.paste((255, 255, 0), (0, 0, 12, 10))
            changed.append(image)
    before, after = (
        np.array([*map(dhash, own)], np.uint64) for own in (originals, changed)
    )
    differ = np.bitwise_count(before[:, None] ^ after[None])
    assert (np.diag(differ) <= NEAR).mean() >= 0.95
    assert differ[~np.eye(40, dtype=bool)].min() > NEAR


def _found(hashes):
    found = near_pairs(np.array(hashes, np.uint64))
    return [tuple(sorted(pair)) for pairs in found for pair in pairs.tolist()]


def _all_pairs(hashes):
    return [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (hashes[i] ^ hashes[j]).bit_count() <= NEAR
    ]


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    st.lists(st.sets(st.integers(0, 63), max_size=7), max_size=30),
)
@settings(max_examples=150, deadline=None)
def test_each_near_pair_is_found_once(bases, changes):
    """Of hashes that differ from a few others in few bits or none."""
    hashes = bases + [
        bases[i % len(bases)] ^ sum(1 << bit for bit in bits)
        for i, bits in enumerate(changes)
    ]
    assert sorted(_found(hashes)) == _all_pairs(hashes)


def test_few_are_compared(monkeypatch):
    """Of 20,000 hashes by chance: less than one in a thousand pairs."""
    compared, count = [], np.bitwise_count
    monkeypatch.setattr(
        duplicates.np, "bitwise_count", lambda x: (compared.append(len(x)), count(x))[1]
    )
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)
    assert not _found(hashes)
    assert sum(compared) < 20_000 * 19_999 / 2 / 1000


@pytest.mark.parametrize("most", [16, 256])
def test_where_too_many_agree_every_picture_is_still_found(monkeypatch, most):
    """2**11 hashes that differ in 11 bits only: each is near 561 others."""
    monkeypatch.setattr(duplicates, "_MOST_NEIGHBOURS", most)
    found = _found(np.arange(2**11))
    everything = 2**11 * sum(math.comb(11, bits) for bits in range(1, NEAR + 1)) // 2
    assert len(found) == everything if most == 256 else len(found) < everything
    assert {place for pair in found for place in pair} == set(range(2**11))
