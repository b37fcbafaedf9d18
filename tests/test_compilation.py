"""Compilers' options and the cache: which program gets which, and what they change."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from imagen_jax import compilation
from imagen_jax.compilation import (
    compiler_options,
    planning_options,
    use_compilation_cache,
)
from imagen_jax.config import MeshConfig
from imagen_jax.planning.chips import slice_devices
from imagen_jax.planning.compile import compile_step
from imagen_jax.sharding import make_mesh, replicated
from tests import tiny


@pytest.fixture(autouse=True)
def forget():
    """Programs that were compiled with other options."""
    yield
    jax.clear_caches()


def test_options_that_a_compiler_does_not_know_are_left_out(monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert compiler_options(mesh, "bfloat16") == {}
    assert compiler_options(mesh, "float32") == compilation._CPU
    once = compiler_options(mesh, "float32", once=True)
    assert once == {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(compilation, "_CPU_ONCE", {"xla_no_such_option": 0})
    assert compiler_options(mesh, "float32", once=True) == {}


@pytest.mark.parametrize(
    ("installed", "devices", "asked", "platforms"),
    [
        ({"libtpu"}, [], None, "cpu"),
        ({"libtpu"}, ["/dev/accel0"], None, None),
        ({"libtpu"}, ["/dev/vfio/0"], None, None),
        ({"libtpu", "jax_plugins"}, [], None, None),
        ({"libtpu"}, [], "tpu,cpu", "tpu,cpu"),
        (set(), [], None, None),
    ],
)
def test_no_tpu_is_looked_for_where_none_can_be(
    installed, devices, asked, platforms, monkeypatch
):
    given = jax.config.jax_platforms
    monkeypatch.setattr(
        compilation, "find_spec", lambda name: True if name in installed else None
    )
    monkeypatch.setattr(
        compilation.glob,
        "glob",
        lambda pattern: [d for d in devices if d.startswith(pattern[:-1])],
    )
    try:
        jax.config.update("jax_platforms", asked)
        compilation.pass_over_libtpu()
        assert jax.config.jax_platforms == platforms
    finally:
        jax.config.update("jax_platforms", given)


def test_the_cache_lies_where_the_user_wants_it(monkeypatch, tmp_path):
    given = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
        for name, value, folder in (
            ("XDG_CACHE_HOME", tmp_path / "x", tmp_path / "x"),
            ("XDG_CACHE_HOME", "", tmp_path / ".cache"),
        ):
            monkeypatch.setenv("HOME", str(tmp_path))
            monkeypatch.setenv(name, str(value))
            jax.config.update("jax_compilation_cache_dir", None)
            use_compilation_cache()
            found = jax.config.jax_compilation_cache_dir
            assert found == str(folder / "imagen-jax" / "jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", given)


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4"])
def test_what_is_only_planned_is_compiled_faster(name):
    pytest.importorskip("libtpu")
    device = slice_devices(name)[0]
    assert planning_options(device, quick=True) == compilation._QUICK_TPU
    assert planning_options(device, quick=False) == compilation._TPU


def test_what_is_here_is_planned_as_it_is_trained():
    assert planning_options(jax.devices()[0], quick=True) == {}


@pytest.mark.slow
def test_convolutions_of_a_plan_are_shorter_programs():
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(), slice_devices("v4-8")[:1])

    def size(options):
        def array(*shape):
            return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=replicated(mesh))

        def run(x, kernel):
            x = jax.nn.silu(x)
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=layout
            )

        jitted = jax.jit(run, compiler_options=options)
        lowered = jitted.lower(array(8, 32, 32, 1024), array(3, 3, 1024, 1024))
        return lowered.compile().memory_analysis().generated_code_size_in_bytes

    assert size(planning_options(mesh.devices.flat[0], quick=False)) < 0.9 * size({})


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_a_plan_is_of_the_program_that_is_trained(quick, monkeypatch):
    """All but the code of convolutions, and so the compiler's cycles, is the same."""
    pytest.importorskip("libtpu")
    cfg = tiny.stage(model={**tiny.ONE_LEVEL, "channels": (128,)})
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), slice_devices("v4-8"))
    planned = compile_step(cfg, mesh, quick)[1]
    monkeypatch.setattr(compilation, "_QUICK_TPU" if quick else "_TPU", {})
    jax.clear_caches()
    trained = compile_step(cfg, mesh, quick)[1]
    if quick:
        assert "by_the_compilers_cycles" not in planned["roofline"]
    else:
        cycles = [
            each["roofline"].pop("by_the_compilers_cycles")
            for each in (planned, trained)
        ]
        assert cycles[1] <= cycles[0] < 1.05 * cycles[1]
    for each in (planned, trained):
        each["memory_gib"].pop("program")
        each["roofline"].pop("with_early_exchanges_hidden", None)
        for name in ("compile_seconds", "trace_seconds", "cycles"):
            each.pop(name)
        each.pop("hbm_gib_per_chip")
    assert planned == trained
