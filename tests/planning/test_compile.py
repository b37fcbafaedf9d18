"""Compiled steps and samplers: each figure against an independent count of it."""

import dataclasses
import json
import math

import jax
import pytest

from imagen_jax.batch import batch_spec
from imagen_jax.config import MeshConfig
from imagen_jax.planning import chips
from imagen_jax.planning import compile as planning
from imagen_jax.planning.compile import compile_sampling, compile_step
from imagen_jax.planning.program import forward_flops
from imagen_jax.planning.search import guess_gib
from imagen_jax.sharding import make_mesh, on_rows
from imagen_jax.training.state import abstract_state
from imagen_jax.training.step import jit_train_step
from tests import tiny

CHIP = chips.Chip(1e12, 1.0, 1e10, 1e9, 1e9)


def stage(**training):
    model = {"self_attention": (True,), "text_attention": (True,), "channels": (16,)}
    return tiny.stage(model={**tiny.ONE_LEVEL, **model}, training=training)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


@pytest.fixture(scope="module")
def made(mesh):
    """The step and its figures, as if the CPU's data sheet were known."""
    # However quickly it is compiled, it is kept where jax keeps programs.
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chips.CHIPS, "cpu", CHIP)
        compiled = compile_step(stage(), mesh)
    jax.config.update(name, before)
    return compiled


@pytest.mark.slow
def test_memory_is_that_of_shapes_and_the_compiler(made, mesh):
    run, found = made
    memory, theirs = found["memory_gib"], run.memory_analysis()
    state = jax.tree.leaves(abstract_state(stage(), mesh))
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in state]
    held = sum(math.prod(shape) * size for shape, size in shapes)
    # An image each: pixels, text in bfloat16 and its mask; nothing uses its id.
    batch = 8 * 8 * 3 + 2 * 4 * 8 + 4
    assert memory["arguments"] * 2**30 == pytest.approx(held + batch)
    shaped = planning.shard_gib((abstract_state(stage(), mesh),))
    assert shaped * 2**30 == held
    # Donated buffers: the state that comes out lies where it went in.
    assert theirs.alias_size_in_bytes == pytest.approx(held, rel=1e-3)
    assert memory["outputs"] * 2**30 < 4096
    total = theirs.argument_size_in_bytes + theirs.temp_size_in_bytes
    total += theirs.output_size_in_bytes - theirs.alias_size_in_bytes
    total += theirs.generated_code_size_in_bytes
    assert found["hbm_gib_per_chip"] * 2**30 == pytest.approx(total)
    assert sum(memory.values()) == pytest.approx(found["hbm_gib_per_chip"])
    assert found["fits"] and found["hbm_limit_gib"] == 1.0


def test_a_guess_is_near_what_is_compiled(made, mesh):
    """The state exactly; activations more than the compiler keeps."""
    memory = made[1]["memory_gib"]
    cfg = dataclasses.replace(stage(), mesh=MeshConfig(data=2, fsdp=4))
    rest = guess_gib(cfg, jax.devices()) - memory["arguments"]
    assert 0.3 < rest / memory["temporaries"] < 3


def test_work_is_that_of_the_network_and_the_compiler(made):
    run, found = made
    theirs = run.cost_analysis()
    # A step is three forward passes, less the gradients of its inputs.
    assert 0.9 < found["flops_per_chip"] / (3 * forward_flops(stage())) < 1
    # The compiler counts what is done to single elements too.
    assert 0.5 < found["flops_per_chip"] / theirs["flops"] < 1
    assert found["bytes_per_chip"] == pytest.approx(theirs["bytes accessed"], rel=0.2)


def test_weights_and_gradients_are_what_is_exchanged(made, mesh):
    """Each weight that is split by fsdp is gathered, its gradient summed over data."""
    leaves = jax.tree.leaves(abstract_state(stage(), mesh).params)
    split = [x for x in leaves if "fsdp" in (x.sharding.spec or ())]
    whole = [x for x in leaves if x not in split]
    found = made[1]["collectives"]
    gathered = sum(4 * x.size for x in split) * 3 / 4
    assert found["all-gather"]["bytes"] == pytest.approx(gathered, rel=0.01)
    # In rings of 2 devices: parts of gradients; of 8: of what is not split; the loss
    # and norms besides. A CPU scatters no sums: it sums over fsdp what it splits then.
    sums = 2 * 7 / 8 * sum(4 * x.size for x in whole)
    least = sums + 2 * 1 / 2 * sum(4 * x.size for x in split) / 4
    most = sums + (2 * 3 / 4 + 1) * sum(4 * x.size for x in split)
    others = {k: v["bytes"] for k, v in found.items() if k != "all-gather"}
    assert 0.9 * least < sum(others.values()) < 1.1 * most + 4096


def test_times_follow_from_the_work(made):
    cfg, found = stage(), made[1]
    lines, seconds = found["roofline"], found["step_seconds"]
    compute, memory = found["flops_per_chip"] / 1e12, found["bytes_per_chip"] / 1e10
    sent = sum(kind["bytes"] for kind in found["collectives"].values())
    assert sent == found["collective_bytes_per_chip"] > 0
    assert lines == {
        "compute_seconds": pytest.approx(compute),
        "memory_seconds": pytest.approx(memory),
        "interconnect_seconds": pytest.approx(sent / 1e9),
    }
    assert seconds == pytest.approx(max(compute, memory) + sent / 1e9)
    assert found["images_per_second"] == pytest.approx(8 / seconds)
    assert found["days"] * 86400 == pytest.approx(seconds * cfg.training.steps)
    assert found["chip_hours"] == pytest.approx(8 * 24 * found["days"])
    done = 3 * forward_flops(cfg) * 8 / seconds
    assert found["peak_share"] == pytest.approx(done / (8 * 1e12))
    assert json.loads(json.dumps(found)) == found
    gib = found["hbm_gib_per_chip"]
    assert (
        planning.summary(found) == f"fits: {gib:.2f} GiB a chip, {seconds:.4g} s a step"
    )


def test_a_compilers_cycles_are_times():
    names = ("flops_per_chip", "bytes_per_chip", "network_bytes_per_chip")
    found = dict(zip(names, (1e12, 3e10, 0))) | {"batch_size": 8}
    found["cycles"] = {"convolution": 4 * 10**9, "copy": 10**9}
    times = planning._times(found, 2e9, 5e8, CHIP)
    assert times["roofline"]["by_the_compilers_cycles"] == 5 + 2
    assert times["roofline"]["with_early_exchanges_hidden"] == 5 + 1.5
    assert times["step_seconds"] == max(1, 3) + 2


def test_a_network_is_another_line():
    names = ("flops_per_chip", "bytes_per_chip", "network_bytes_per_chip")
    found = dict(zip(names, (1e12, 0, 3e8))) | {"batch_size": 8, "cycles": {}}
    chip = dataclasses.replace(CHIP, network=1e8)
    times = planning._times(found, 2e9, 0, chip)
    assert times["roofline"]["interconnect_seconds"] == 2 + 3
    assert times["step_seconds"] == 1 + 2 + 3


@pytest.mark.slow
def test_microbatches_are_counted(mesh):
    """A loop of two turns, each of what a step does for half of the batch."""
    training = {"batch_size": 16, "microbatches": 2}
    cfg = tiny.stage(model=tiny.ONE_LEVEL, training=training)
    found = compile_step(cfg, mesh)[1]
    assert 0.9 < found["flops_per_chip"] / (3 * 2 * forward_flops(cfg)) < 1
    leaves = jax.tree.leaves(abstract_state(cfg, mesh).params)
    split = sum(4 * x.size for x in leaves if "fsdp" in (x.sharding.spec or ()))
    # Weights are gathered before the loop or in each turn.
    assert 0.99 < found["collectives"]["all-gather"]["bytes"] / (split * 3 / 4) < 2.01
    # Without a data sheet there are no times.
    assert found["step_seconds"] is None and "days" not in found and found["fits"]


def test_a_sampler_costs_by_its_steps(mesh, monkeypatch):
    """Of 6 guided steps, two passes each, and 5 images that are filled up to 8."""
    monkeypatch.setitem(chips.CHIPS, "cpu", CHIP)
    sampler = {"steps": 6, "guidance": 2.0, "batch_size": 5}
    cfg = tiny.stage(model=tiny.ONE_LEVEL, sampler=sampler)
    found = compile_sampling(cfg, mesh)[1]
    assert found["flops_per_chip"] == 6 * 2 * forward_flops(cfg)
    assert found["batch_size"] == 8 and "days" not in found
    assert found["chip_seconds_per_image"] == pytest.approx(6 * found["step_seconds"])
    assert found["images_per_second"] == pytest.approx(8 / 6 / found["step_seconds"])


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (300.00G) exceeds "
            "available HBM (30.75G). HLO module: jit_inside.\nmore",
            300,
        ),
        ("RESOURCE_EXHAUSTED: Used 512.5M of 256.0M hbm. Exceeded", 512.5 / 1024),
        ("RESOURCE_EXHAUSTED: out of memory", 0),
    ],
)
def test_a_step_that_does_not_fit_is_a_message(mesh, monkeypatch, message, gib):
    """As the compiler of a TPU ends then; a CPU has no limit that it checks."""

    class Step:
        def trace(self, *_):
            return self

        lower = trace

        def compile(self, **_):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(planning, "jit_train_step", lambda *_: Step())
    run, found = compile_step(stage(), mesh)
    assert run is None and not found["fits"] and found["hbm_gib_per_chip"] == gib
    text = planning.summary(found)
    assert text.startswith(f"does not fit: {gib:.2f} GiB a chip (RESOURCE_EXHAUSTED")
    assert "\n" not in text


@pytest.mark.slow
def test_what_was_planned_here_is_compiled_for_training(made, mesh):
    """The training's own program then comes from the cache, where jax keeps one."""
    if not jax.config.jax_compilation_cache_dir:
        pytest.skip("no cache")
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    jax.clear_caches()
    cfg = stage()
    step = jit_train_step(cfg, mesh)
    arguments = abstract_state(cfg, mesh), on_rows(batch_spec(cfg), mesh)
    step.lower(*arguments).compile()
    assert "/jax/compilation_cache/cache_hits" in events
