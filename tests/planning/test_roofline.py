"""Times of hand-made programs."""

import pytest

from imagen_jax.planning.chips import CHIPS, Chip
from imagen_jax.planning.roofline import estimate
from imagen_jax.planning.work import Program, Work

# 100 operations, 10 bytes and 5 sent bytes a second; 2 cycles a second.
CHIP = Chip("toy", 100.0, 1.0, 10.0, 5.0, 2.0)


def times(*work):
    return estimate(Program(list(work), 0, []), CHIP)


def test_each_operation_takes_its_own_bottleneck():
    """3 turns of 2 s of arithmetic and 1 s of memory; then 4 s of memory alone."""
    found = times(Work("a", 3, flops=200, moved_bytes=10), Work("b", moved_bytes=40))
    assert found.compute == 6 and found.memory == 7
    assert found.total == 3 * 2 + 4
    assert found.cycles == 0


def test_exchanges_wait_unless_they_are_started_early():
    product = Work("a", flops=300)
    sum_ = Work("b", 2, collective="all-reduce", sent_bytes=10)
    assert times(product, sum_).total == 3 + 2 * 2
    early = Work("b", 2, collective="all-reduce", sent_bytes=10, overlaps=True)
    found = times(product, early)
    assert found.total == 4 and found.interconnect == 4
    assert times(Work("a", flops=900), early).total == 9


def test_prefetches_cost_bandwidth_only():
    product = Work("a", flops=300, moved_bytes=10)
    copy = Work("copy-start", moved_bytes=10, overlaps=True)
    assert times(product, copy).total == 3
    assert times(product, copy, copy, copy).total == 4


def test_the_compilers_cycles():
    found = times(
        Work("a", 4, cycles=3), Work("b", collective="all-reduce", sent_bytes=5)
    )
    assert found.cycles == 4 * 3 / 2 + 1


@pytest.mark.parametrize(
    ("name", "units", "side"),
    [("TPU v4", 8, 128), ("TPU v5 lite", 4, 128), ("TPU v5", 8, 128)]
    + [("TPU v6 lite", 4, 256)],
)
def test_clocks_agree_with_the_peaks(name, units, side):
    """To the digits that data sheets have."""
    chip = CHIPS[name]
    peak = 2 * units * side**2 * chip.clock
    assert peak == pytest.approx(chip.flops, rel=0.002)
