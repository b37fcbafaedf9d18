"""TPU slices that are not here."""

import importlib.util
import math

import pytest

from imagen_jax import topology
from imagen_jax.errors import UserError


def test_a_slice_is_named_by_its_cores_two_to_a_chip():
    for name, chips in topology.SLICES.items():
        assert 2 * math.prod(chips) == int(name.removeprefix("v4-"))


def test_an_unknown_slice_is_refused():
    with pytest.raises(UserError, match="no slice 'v4-521'.*did you mean 'v4-512'"):
        topology.slice_devices("v4-521")


def test_the_devices_of_a_slice():
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(UserError, match="pip install libtpu"):
            topology.slice_devices("v4-16")
    else:
        devices = topology.slice_devices("v4-16")
        assert {d.platform for d in devices} == {"tpu"} and len(devices) == 8
