"""Plans: each figure against an independent count of it."""

import dataclasses
import json
import math
import re

import jax
import pytest

from imagen_jax import plan
from imagen_jax.config import MeshConfig
from imagen_jax.errors import UserError
from imagen_jax.planning import chips as topology
from imagen_jax.planning import printed
from imagen_jax.planning import report as planned
from imagen_jax.planning import search as settings
from imagen_jax.planning.compile import (
    DoesNotFit,
    abstract_batch,
    arrays_of,
    compile_sampling,
    compile_step,
)
from imagen_jax.planning.flops import forward_flops
from imagen_jax.planning.search import Setting
from imagen_jax.sharding import make_mesh, replicated
from imagen_jax.training.state import abstract_state
from imagen_jax.training.step import compile_train_step
from tests import tiny
from tests.test_doors import door, error

GIB = 2**30
CHIP = topology.Chip("toy", 1e12, 1.0, 1e10, 1e9)


def stage(**training):
    model = {"self_attention": (True,), "text_attention": (True,), "channels": (16,)}
    return tiny.stage(model={**tiny.ONE_LEVEL, **model}, training=training)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


@pytest.fixture(scope="module")
def made(mesh):
    return compile_step(stage(), mesh)


@pytest.fixture
def chip(monkeypatch):
    """As if the CPU's data sheet were known."""
    monkeypatch.setitem(topology.CHIPS, "cpu", CHIP)


def bytes_of(tree):
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in tree]
    return sum(math.prod(shape) * size for shape, size in shapes)


def test_memory_is_that_of_shapes_and_the_compiler(made, mesh):
    cfg = stage()
    found = planned.figures(cfg, mesh, made, "train")
    memory, state = found["memory_gib"], abstract_state(cfg, mesh)
    for name, tree in (
        ("parameters", state.params),
        ("ema", state.ema),
        ("optimizer", state.opt_state),
    ):
        assert memory[name] * GIB == pytest.approx(bytes_of(jax.tree.leaves(tree)))
    # A picture each: pixels, text in bfloat16, its mask, its number.
    assert memory["batch"] * GIB == pytest.approx(8 * 8 * 3 + 2 * 4 * 8 + 4 + 4)
    theirs = made.run.memory_analysis()
    total = theirs.argument_size_in_bytes + theirs.temp_size_in_bytes
    total += theirs.output_size_in_bytes - theirs.alias_size_in_bytes
    total += theirs.generated_code_size_in_bytes
    assert found["hbm_gib_per_chip"] * GIB == pytest.approx(total, rel=1e-3)
    assert sum(memory.values()) == pytest.approx(found["hbm_gib_per_chip"])
    # On a CPU there are no tiles: all but the step's number is of the parts above.
    assert abs(memory["padding of these"] * GIB) < 1024


def test_work_is_that_of_the_network_and_the_compiler(made, mesh):
    found = planned.figures(stage(), mesh, made, "train")
    theirs = made.run.cost_analysis()
    ours = 3 * forward_flops(stage()) * 8 / 8
    # Of 3 x 3 pixels around each of 8 x 8 so many are inside.
    assert (22 / 24) ** 2 < found["flops_per_chip"] / ours < 1.1
    # The compiler counts what is done to single elements too.
    assert 0.5 < found["flops_per_chip"] / theirs["flops"] < 1
    assert found["bytes_per_chip"] == pytest.approx(theirs["bytes accessed"], rel=0.2)
    assert found["padding_waste"]["of_bytes"] == 0


def test_weights_and_gradients_are_what_is_exchanged(made, mesh):
    """Each weight that is split by fsdp is gathered, its gradient summed over data."""
    state = abstract_state(stage(), mesh)
    leaves = jax.tree.leaves(state.params)
    split = [x for x in leaves if "fsdp" in (x.sharding.spec or ())]
    whole = [x for x in leaves if x not in split]
    found = planned.figures(stage(), mesh, made, "train")["collectives"]
    gathered = sum(4 * x.size for x in split) * 3 / 4
    assert found["all-gather"]["bytes"] == pytest.approx(gathered, rel=0.01)
    # In rings of 2 devices: parts of gradients; of 8: of what is not split; the loss
    # and norms besides. A CPU scatters no sums: it sums over fsdp what it splits then.
    sums = 2 * 7 / 8 * sum(4 * x.size for x in whole)
    least = sums + 2 * 1 / 2 * sum(4 * x.size for x in split) / 4
    most = sums + (2 * 3 / 4 + 1) * sum(4 * x.size for x in split)
    others = {k: v["bytes"] for k, v in found.items() if k != "all-gather"}
    assert 0.9 * least < sum(others.values()) < 1.1 * most + 4096


def test_times_follow_from_the_work(made, mesh, chip):
    cfg = stage()
    found = planned.figures(cfg, mesh, made, "train")
    each, seconds = found["roofline"], found["step_seconds"]
    assert each["compute_seconds"] == pytest.approx(found["flops_per_chip"] / 1e12)
    assert each["memory_seconds"] == pytest.approx(found["bytes_per_chip"] / 1e10)
    sent = sum(kind["bytes"] for kind in found["collectives"].values())
    assert each["interconnect_seconds"] == pytest.approx(sent / 1e9)
    parts = [each[f"{n}_seconds"] for n in ("compute", "memory", "interconnect")]
    assert max(parts) <= seconds <= sum(parts)
    assert found["images_per_second"] == pytest.approx(8 / seconds)
    assert found["days"] * 86400 == pytest.approx(seconds * cfg.training.steps)
    assert found["chip_hours"] == pytest.approx(8 * 24 * found["days"])
    done = 3 * forward_flops(cfg) * 8 / seconds
    assert found["peak_share"] == pytest.approx(done / (8 * 1e12))
    text = printed.report(found)
    assert "fits: 0.00 of 1.00 GiB" in text and "chip-hours" in text


def test_microbatches_are_counted(made, mesh):
    """A loop of two turns, each of what the whole step does for half of the batch."""
    cfg = stage(batch_size=16, microbatches=2)
    one = planned.figures(stage(), mesh, made, "train")
    two = planned.figures(cfg, mesh, compile_step(cfg, mesh), "train")
    assert two["flops_per_chip"] == pytest.approx(2 * one["flops_per_chip"], rel=0.02)
    sent = [each["collectives"]["all-gather"]["bytes"] for each in (one, two)]
    assert sent[0] <= sent[1] <= 2.01 * sent[0]


def test_a_sampler_costs_by_its_steps(mesh, chip):
    """Of 6 guided steps, two passes each."""
    sampler = {"steps": 6, "guidance": 2.0}
    cfg = tiny.stage(model=tiny.ONE_LEVEL, sampler=sampler)
    row = planned.figures(cfg, mesh, compile_sampling(cfg, mesh), "sample")
    passes = 6 * 2 * forward_flops(cfg)
    assert (22 / 24) ** 2 < row["flops_per_chip"] / passes < 1.1
    assert row["batch_size"] == 8 and row["days"] is None
    assert row["seconds"] == pytest.approx(6 * row["step_seconds"])
    assert row["chip_seconds_per_image"] == pytest.approx(row["seconds"])
    assert row["peak_share"] * row["seconds"] * 8e12 == pytest.approx(passes * 8)
    assert "chip-seconds a picture" in printed.report(row)


def test_without_a_data_sheet_there_are_no_times(made, mesh):
    found = planned.figures(stage(), mesh, made, "train")
    assert found["step_seconds"] is None and found["fits"]
    assert "no data sheet of 'cpu'" in printed.report(found)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp:4", "no axis 'fdsp' .did you mean 'fsdp'.*data:-1,fsdp:16"),
        ("fsdp", "fsdp has no whole number"),
        ("fsdp:4.0", "fsdp:4.0 has no whole number"),
        ("fsdp:2,fsdp:4", "fsdp is there twice"),
        ("", "no axis ''"),
    ],
)
def test_a_mesh_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        plan.with_mesh(stage(), text)


def test_axes_that_are_not_named_stay():
    cfg = plan.with_mesh(stage(), "fsdp:4, tensor:2")
    assert cfg.mesh == dataclasses.replace(stage().mesh, fsdp=4, tensor=2)


def test_guesses_are_near_what_is_compiled(made, mesh):
    """Memory of the state exactly; of activations more than the compiler keeps."""
    cfg = stage()
    guessed = settings.guess(cfg, mesh, CHIP)
    memory = planned.figures(cfg, mesh, made, "train")["memory_gib"]
    held = sum(memory[n] for n in ("parameters", "ema", "optimizer", "batch"))
    # And the step's number, and what the guard knows.
    shapes = abstract_state(cfg, mesh)
    scalars = jax.tree.leaves((shapes.step, shapes.guard))
    rest = sum(leaf.dtype.itemsize for leaf in scalars)
    assert guessed.state_gib * GIB == pytest.approx(held * GIB + rest)
    assert 0.3 < guessed.step_gib / memory["temporaries"] < 3
    whole = forward_flops(cfg) * 3 * 8 / 8 / CHIP.flops
    assert guessed.seconds > whole


def test_guessed_activations_shrink_with_remat_and_microbatches(mesh):
    cfg = stage(batch_size=64)
    here = Setting.of(cfg, mesh)
    found = [
        settings.guess(dataclasses.replace(here, remat=r).apply(cfg), mesh, None)
        for r in settings.REMAT
    ]
    assert found[0].step_gib > found[1].step_gib > found[2].step_gib
    parts = settings.guess(
        dataclasses.replace(here, microbatches=8).apply(cfg), mesh, None
    )
    assert parts.step_gib < found[0].step_gib


def test_settings_come_in_the_promised_order(mesh):
    """More fsdp, then remat, then microbatches; all of them divide."""
    cfg = stage(batch_size=32)
    found = list(settings.next_settings(cfg, mesh))
    assert dict(found[0].axes)["fsdp"] == 8 and found[0].remat == "none"
    assert found[1].remat == "activations" and dict(found[1].axes)["fsdp"] == 4
    assert [s.microbatches for s in found] == sorted(s.microbatches for s in found)
    for each in found:
        sizes = dict(each.axes)
        assert math.prod(sizes.values()) == 8
        assert 32 % (sizes["data"] * sizes["fsdp"] * each.microbatches) == 0
    flags = found[-1].flags(Setting.of(cfg, mesh))
    assert flags == (
        "--mesh=fsdp:8 --config.model.remat=blocks --config.training.microbatches=4"
    )


@pytest.fixture
def compiler(monkeypatch, chip):
    """In place of one: a program takes as much memory and time as was guessed.

    But one with few shards takes more time than that.
    """

    def plan_(cfg, mesh, what):
        found = settings.guess(cfg, mesh, CHIP)
        asked.append(Setting.of(cfg, mesh))
        if found.gib > topology.CHIPS["cpu"].memory_gib:
            raise DoesNotFit("too much", found.gib)
        seconds = found.seconds + 1 / mesh.shape["fsdp"]
        return {
            "fits": True,
            "hbm_gib_per_chip": found.gib,
            "step_seconds": seconds,
            "peak_share": 0.5,
            "images_per_second": 1 / seconds,
        }

    asked = []
    monkeypatch.setattr(plan, "plan", plan_)
    return asked


def limit(monkeypatch, gib):
    chip = dataclasses.replace(CHIP, memory_gib=gib)
    monkeypatch.setitem(topology.CHIPS, "cpu", chip)


def test_the_nearest_setting_that_fits(monkeypatch, compiler):
    """Splitting the state is enough; then what is kept must shrink; then nothing is."""
    cfg = dataclasses.replace(stage(batch_size=64), mesh=MeshConfig(data=8))
    mesh = make_mesh(cfg.mesh)
    own = settings.guess(cfg, mesh, CHIP)
    limit(monkeypatch, own.gib - 1e-9)
    setting, _ = plan.nearest(cfg, jax.devices(), mesh, own.gib)
    assert setting.flags(Setting.of(cfg, mesh)) == "--mesh=data:4,fsdp:2"
    limit(monkeypatch, own.step_gib * 0.9)
    setting, found = plan.nearest(cfg, jax.devices(), mesh, own.gib)
    assert setting.remat == "activations" and setting.microbatches == 1
    assert found["hbm_gib_per_chip"] < own.step_gib * 0.9
    limit(monkeypatch, 1e-9)
    del compiler[:]
    assert plan.nearest(cfg, jax.devices(), mesh, own.gib) is None and not compiler


def test_a_guess_is_made_right_by_what_was_needed(monkeypatch, compiler):
    """Three times as much as guessed: settings that would not fit are not compiled."""
    cfg = dataclasses.replace(stage(batch_size=64), mesh=MeshConfig(data=8))
    mesh = make_mesh(cfg.mesh)
    own = settings.guess(cfg, mesh, CHIP)
    limit(monkeypatch, 2 * own.gib)
    plan.nearest(cfg, jax.devices(), mesh, own.state_gib + 3 * own.step_gib)
    assert compiler[0].remat == "activations"


def test_a_program_too_large_is_refused(monkeypatch, made, mesh):
    """Without compiling it, where the state does not fit or the guess is far off."""
    own = settings.guess(stage(), mesh, None)
    limit(monkeypatch, own.state_gib * 0.99)
    with pytest.raises(DoesNotFit, match="EMA and batch alone take 0.00 of 0.00 GiB"):
        plan.check_guess(stage(), mesh)
    cfg = stage(batch_size=8 * 2**20)
    limit(monkeypatch, 2**20 * own.step_gib / 4)
    with pytest.raises(DoesNotFit, match="guessed, not compiled, to take"):
        plan.check_guess(cfg, mesh)
    limit(monkeypatch, own.gib)
    plan.check_guess(stage(), mesh)

    monkeypatch.setattr(plan, "compile_step", lambda *_: made)
    monkeypatch.setattr(plan, "check_guess", lambda *_: None)
    limit(monkeypatch, 1e-6)
    with pytest.raises(DoesNotFit, match="takes .* of 0.00 GiB of each of 8") as raised:
        plan.plan(stage(), mesh, "train")
    figures = planned.figures(stage(), mesh, made, "train")
    assert raised.value.needed_gib == figures["hbm_gib_per_chip"]


def test_a_search_ranks_what_it_compiles(compiler, capsys):
    cfg = stage()
    rows = plan.search(cfg, jax.devices(), make_mesh(cfg.mesh), 3)
    assert len(rows) == len(compiler) == 3
    seconds = [row["step_seconds"] for row in rows]
    assert seconds == sorted(seconds)
    text = capsys.readouterr().out
    assert "12 settings, 12 of them guessed to fit; compiling the fastest 3" in text
    assert len(re.findall(r"1 microbatch; remat", text)) == 3


def test_what_was_planned_here_is_compiled_for_training(made, mesh):
    """The training's own program then comes from the cache, where jax keeps one."""
    if not jax.config.jax_compilation_cache_dir:
        pytest.skip("no cache")
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    jax.clear_caches()
    cfg = stage()
    step = compile_train_step(cfg, mesh)
    step.lower(abstract_state(cfg, mesh), abstract_batch(cfg, mesh)).compile()
    assert "/jax/compilation_cache/cache_hits" in events


@pytest.mark.slow
def test_a_slice_that_is_not_here():
    pytest.importorskip("libtpu")
    cfg = stage(batch_size=16)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), topology.slice_devices("v4-8"))
    found = plan.plan(cfg, mesh, "train")
    assert found["fits"] and found["hbm_limit_gib"] == 30.75
    assert found["padding_waste"]["of_bytes"] > 0.1
    ours = 3 * forward_flops(cfg) * 16 / 4
    # Of some convolutions with few channels a TPU's compiler makes others, larger.
    assert 0.7 < found["flops_per_chip"] / ours < 2
    assert found["collectives"]["all-gather"]["count"] > 0
    assert 0 < found["step_seconds"] < found["roofline"]["by_the_compilers_cycles"]


@pytest.mark.slow
def test_no_chip_of_256_holds_the_whole_batch():
    """13 rows a chip of 3328: no array is as long, but one that is gathered is told."""
    pytest.importorskip("libtpu")
    cfg = tiny.sr_stage(model={"channels": (64, 128)}, training={"batch_size": 3328})
    mesh = make_mesh(MeshConfig(fsdp=16), topology.slice_devices("v4-512"))
    made = compile_step(cfg, mesh)
    assert made.report["arrays_as_long_as_the_batch"] == []
    assert "u8[13,16,16,3]" in made.run.as_text()
    whole = jax.jit(lambda batch: batch.image + 1, out_shardings=replicated(mesh))
    text = whole.lower(abstract_batch(cfg, mesh)).compile().as_text()
    assert "u8[3328,16,16,3]" in arrays_of(text, 3328)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v4-521"], "did you mean 'v4-512'"),
        (["--mesh=fsdp:3"], "an axis can be one of [1]"),
        (["--mesh=fsdp=2"], "no axis 'fsdp=2'"),
        (["--json=configs"], "is a folder"),
        (["--config.training.microbatches=3"], "use a multiple of 3"),
        (["--search", "--what=sample"], "--search is for training"),
    ],
)
def test_bad_calls(arguments, message):
    done = door("plan", "--config=configs/tiny.py:base", *arguments)
    assert done.returncode == 1 and message in error(done)
