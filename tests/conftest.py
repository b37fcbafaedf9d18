"""Tests run on eight virtual CPU devices, so that meshes are real.

A test that wants one device takes `jax.devices()[:1]`.
"""

import collections
import gc
import importlib.util
import os
import sys

import pytest

# Before jax is imported: it reads these once. Subprocesses of tests inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"
).strip()
# Tests compile far longer than they run, and so a third less. libtpu, which some tests
# compile with, ends the process that has a flag it does not know.
if importlib.util.find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false"
        " --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
# The same small programs are compiled in many tests and in the doors' processes.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(os.path.dirname(__file__), os.pardir, ".pytest_cache", "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# TensorFlow's start-up messages would bury a failing subprocess's own.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


# Tracing makes many objects and few circles: collecting them took a tenth of the time.
gc.set_threshold(100_000, 20, 100)


def pytest_collection_modifyitems(items):
    """Files with most slow tests first: what starts last should not take long."""
    slow = collections.Counter(
        item.path for item in items if item.get_closest_marker("slow")
    )
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def _cached_again():
    """A test that compiles for absent devices leaves the cache off, as `plan` wants."""
    yield
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_enable_compilation_cache", True)
