"""An untrained cascade on one device, whose programs the tests of a file share."""

import jax
import pytest

from imagen_jax import sharding
from imagen_jax.api.library import Cascade
from imagen_jax.config import MeshConfig
from tests import tiny


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def cascade(mesh):
    return Cascade(tiny.untrained(), mesh=mesh)
