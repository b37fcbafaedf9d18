"""Absent TPU slices and GPUs, and the data sheets of chips."""

import importlib.util
import math

import pytest

from imagen_jax.errors import UserError
from imagen_jax.planning import chips


def test_slices_are_named_as_google_does():
    """v4 and v5p by cores, two to a chip, the others by chips."""
    assert len(chips.SLICES) == 2 * 10 + 3 * 7
    for name, bounds in chips.SLICES.items():
        generation, _, size = name.partition("-")
        cores = 2 if generation in ("v4", "v5p") else 1
        assert cores * math.prod(map(int, bounds.split("x"))) == int(size)


@pytest.mark.parametrize(
    ("name", "near"),
    [("v4-521", "v4-512"), ("v5e-265", "v5e-256"), ("v5litepod16", "v5litepod-16")]
    + [("h100", "h100-8"), ("a100-9", "a100-8")],
)
def test_an_unknown_slice_is_refused(name, near):
    with pytest.raises(UserError, match=f"no slice '{name}'.*did you mean '{near}'"):
        chips.slice_devices(name)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("v4-16", "TPU v4", 8),
        ("v5litepod-16", "TPU v5 lite", 16),
        ("v5e-4", "TPU v5 lite", 4),
        ("v5p-16", "TPU v5", 8),
        ("v6e-8", "TPU v6 lite", 8),
    ],
)
def test_the_devices_of_a_slice(name, kind, count):
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(UserError, match="pip install libtpu"):
            chips.slice_devices(name)
    else:
        devices = chips.slice_devices(name)
        assert {d.platform for d in devices} == {"tpu"} and len(devices) == count
        assert devices[0].device_kind == kind and kind in chips.CHIPS


@pytest.mark.parametrize(
    ("name", "units", "side"),
    [("TPU v4", 8, 128), ("TPU v5 lite", 4, 128), ("TPU v5", 8, 128)]
    + [("TPU v6 lite", 4, 256)],
)
def test_clocks_agree_with_the_peaks(name, units, side):
    """To the digits that data sheets have."""
    chip = chips.CHIPS[name]
    peak = 2 * units * side**2 * chip.clock
    assert peak == pytest.approx(chip.flops, rel=0.002)


@pytest.mark.parametrize(
    ("name", "hosts"),
    [("a100-8", 1), ("h100-1", 1), ("h100-16", 2), ("h200-8", 1)],
)
def test_absent_gpus(name, hosts):
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        with pytest.raises(UserError, match=r"pip install 'imagen-jax\[plan-gpu\]'"):
            chips.slice_devices(name)
        return
    devices = chips.slice_devices(name)
    assert len(devices) == int(name.partition("-")[2])
    assert len({device.process_index for device in devices}) == hosts
    assert {device.platform for device in devices} == {"gpu"}
    assert devices[0].device_kind in chips.CHIPS


@pytest.mark.parametrize(
    ("name", "operations", "clock"),
    [("a100", 4 * 512, 1.41), ("h100", 4 * 1024, 1.83), ("h200", 4 * 1024, 1.83)],
)
def test_gpus_have_the_multiprocessors_of_their_peaks(name, operations, clock):
    """Operations a cycle of its four tensor cores; their clock on H100 is lower."""
    kind, cores, *_ = chips._GPUS[name]
    peak = cores * operations * clock * 1e9
    assert peak == pytest.approx(chips.CHIPS[kind].flops, rel=0.002)
