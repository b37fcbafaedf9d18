"""Guesses and settings: against shapes, compiled programs, and a compiler by hand."""

import dataclasses

import jax
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.planning import chips, search
from imagen_jax.planning import compile as planning
from imagen_jax.planning.compile import compile_step
from imagen_jax.planning.search import flags, guess_gib
from imagen_jax.sharding import make_mesh
from imagen_jax.training.state import abstract_state
from tests import tiny
from tests.planning.test_compile import CHIP, stage


def on(cfg, **axes):
    return dataclasses.replace(cfg, mesh=MeshConfig(**{"data": 1, **axes}))


def gib(cfg):
    return guess_gib(cfg, jax.devices())


def limit(monkeypatch, value):
    chip = dataclasses.replace(CHIP, memory_gib=value)
    monkeypatch.setitem(chips.CHIPS, "cpu", chip)


@pytest.mark.slow
def test_guesses_shrink_with_fsdp_remat_and_microbatches():
    cfg = on(stage(batch_size=64), data=2, fsdp=4)
    mesh = make_mesh(cfg.mesh)
    state = planning.shard_gib(abstract_state(cfg, mesh))
    remat = [
        gib(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=each)))
        for each in search.REMAT
    ]
    assert remat[0] > remat[1] > remat[2] > state
    assert gib(on(cfg, data=8)) > gib(on(cfg, fsdp=8))
    parts = on(stage(batch_size=64, microbatches=8), data=2, fsdp=4)
    assert gib(parts) < remat[0]


def test_settings_are_all_that_divide_the_likely_fast_first():
    cfg = on(stage(batch_size=32), data=2, fsdp=2, tensor=2)
    found = list(search.settings(cfg))
    assert len(found) == len(set(found)) == 4 * 3 * 3 and cfg in found
    order = [
        (s.training.microbatches, search.REMAT.index(s.model.remat), s.mesh.fsdp)
        for s in found
    ]
    assert order == sorted(order)
    for each in found:
        assert each.mesh.data * each.mesh.fsdp == 4 and each.mesh.tensor == 2
        assert 32 % (4 * each.training.microbatches) == 0
    assert flags(found[-1]) == (
        "--mesh=data:1,fsdp:4,spatial:1,tensor:2 --config.model.remat=blocks "
        "--config.training.microbatches=8"
    )


@pytest.fixture
def compiler(monkeypatch):
    """In place of one: a program takes as much memory as was guessed, times `times`."""

    class Compiler:
        times, asked = 1.0, []

        def step(self, cfg, mesh, quick):
            assert quick
            self.asked.append(cfg)
            needed = self.times * gib(cfg)
            fits = needed <= chips.CHIPS["cpu"].memory_gib
            return None, {"fits": fits, "hbm_gib_per_chip": needed}

    made = Compiler()
    made.asked = []
    monkeypatch.setattr(planning, "compile_step", made.step)
    return made


def test_the_nearest_setting_that_fits(monkeypatch, compiler):
    """Splitting the state is enough; then what is kept must shrink; then nothing is."""
    cfg = on(stage(batch_size=64), data=8)
    own, split = gib(cfg), gib(on(cfg, fsdp=8))

    def nearest():
        found = search.compile_settings(cfg, jax.devices(), 3, own)
        return next((each for each in found if each["fits"]), None)

    limit(monkeypatch, own * (1 - 1e-9))
    assert nearest()["flags"].startswith(
        "--mesh=data:4,fsdp:2,spatial:1,tensor:1 --config.model.remat=none"
    )
    limit(monkeypatch, split * (1 - 1e-9))
    found = nearest()
    assert "remat=activations --config.training.microbatches=1" in found["flags"]
    assert found["hbm_gib_per_chip"] < split
    limit(monkeypatch, 1e-9)
    del compiler.asked[:]
    assert nearest() is None and not compiler.asked


def test_guesses_are_made_right_by_what_was_needed(monkeypatch, compiler, capsys):
    """Settings that then do not fit are not compiled."""
    cfg = on(stage(batch_size=64), data=8)
    compiler.times = 3
    limit(monkeypatch, 2 * gib(cfg))
    known = list(search.compile_settings(cfg, jax.devices(), 2, 3 * gib(cfg)))
    assert [each["fits"] for each in known] == [True, True]
    assert compiler.asked[0].model.remat != "none"
    # Nothing is known before the first is compiled.
    learnt = list(search.compile_settings(cfg, jax.devices(), 3))
    assert [each["fits"] for each in learnt] == [False, True, True]
    assert [each["flags"] for each in learnt[1:]] == [each["flags"] for each in known]
    assert f"compiling {known[0]['flags']}\nfits: " in capsys.readouterr().out


def test_a_program_that_is_hopeless_is_not_compiled(monkeypatch, compiler):
    cfg = on(stage(), data=8)
    limit(monkeypatch, gib(cfg) * 0.35)
    found = search.plan(cfg, jax.devices(), "train")
    assert not found["fits"] and found["hbm_gib_per_chip"] == gib(cfg)
    assert "not compiled" in planning.summary(found) and not compiler.asked
    # State and batch alone are too large, whatever the rest is.
    large = on(stage(batch_size=8), data=8)
    held = search.held_gib(large, jax.devices())
    limit(monkeypatch, held * 0.99)
    monkeypatch.setattr(search, "guess_gib", lambda *_: held)
    found = search.plan(large, jax.devices(), "train")
    assert found["guessed"] and not compiler.asked
    monkeypatch.undo()
    monkeypatch.setattr(planning, "compile_step", compiler.step)
    limit(monkeypatch, gib(cfg) * 0.9)
    found = search.plan(cfg, jax.devices(), "train")
    assert not found["fits"] and compiler.asked


def test_the_nearest_by_a_guess(monkeypatch, compiler):
    """The same remat before fewer microbatches; nothing is compiled."""
    cfg = on(stage(batch_size=256), data=8)
    parts = dataclasses.replace(cfg.training, microbatches=4)
    smaller = dataclasses.replace(cfg, training=parts)
    limit(monkeypatch, gib(smaller))
    found = search.nearest(cfg, jax.devices())
    assert "remat=none --config.training.microbatches=4" in found["flags"]
    assert planning.summary(found).endswith("GiB a chip (a guess)")
    limit(monkeypatch, 1e-9)
    assert search.nearest(cfg, jax.devices()) is None and not compiler.asked


@pytest.mark.slow
def test_an_absent_slice():
    pytest.importorskip("libtpu")
    cfg = on(stage(batch_size=16), data=2, fsdp=2)
    found = search.plan(cfg, chips.slice_devices("v4-8"), "train", quick=False)
    assert found["fits"] and found["hbm_limit_gib"] == 30.75
    assert found["collectives"]["all-gather"]["count"] > 0
    assert 0 < found["step_seconds"] < found["roofline"]["by_the_compilers_cycles"]


@pytest.mark.slow
def test_no_chip_of_256_holds_the_whole_batch():
    """13 rows a chip of 3328: no array is as long."""
    pytest.importorskip("libtpu")
    cfg = tiny.sr_stage(model={"channels": (64, 128)}, training={"batch_size": 3328})
    mesh = make_mesh(MeshConfig(fsdp=16), chips.slice_devices("v4-512"))
    text = compile_step(cfg, mesh)[0].as_text()
    assert "u8[13,16,16,3]" in text
    assert "[3328," not in text and ",3328" not in text
