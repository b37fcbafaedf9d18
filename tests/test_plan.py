"""The plan door: what it says, writes and refuses."""

import json
import types

import pytest

from imagen_jax import cli, plan
from imagen_jax.configs import tiny as configs
from imagen_jax.errors import UserError
from imagen_jax.planning import search

FITS = {"fits": True, "hbm_gib_per_chip": 6.5, "step_seconds": 0.25}


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Calls the door with flags; returns what it wrote."""

    def run(**changes):
        given = {
            "config": configs.get_config("base"),
            "json": str(tmp_path / "plan.json"),
            "topology": None,
            "mesh": None,
            "what": "train",
            "quick": True,
            "cycles": False,
            "search": False,
            "tries": 3,
            **changes,
        }
        monkeypatch.setattr(plan.flags, "FLAGS", types.SimpleNamespace(**given))
        try:
            plan.main()
        finally:
            path = tmp_path / "plan.json"
            run.written = json.loads(path.read_text()) if path.exists() else None
        return run.written

    return run


def test_a_stage_that_fits_is_told(call, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(search, "plan", lambda *args: asked.append(args) or {**FITS})
    written = call(mesh="data:-1, fsdp:2", what="sample")
    assert written.pop("host_memory_gib") > 0
    assert written == {"topology": "here", "stage": "base", **FITS}
    (cfg, devices, what, quick), *_ = asked
    assert quick and (cfg.mesh.data, cfg.mesh.fsdp) == (4, 2) and len(devices) == 8
    assert what == "sample"
    text = capsys.readouterr().out
    assert "assumed: peak rates" in text
    assert text.endswith("fits: 6.50 GiB a chip, 0.25 s a step\n")


@pytest.mark.parametrize("flags", [{"cycles": True}, {"quick": False}])
def test_cycles_take_longer(call, monkeypatch, flags):
    asked = []
    monkeypatch.setattr(search, "plan", lambda *args: asked.append(args) or {**FITS})
    call(**flags)
    assert asked[0][-1] is False


def test_what_is_hopeless_gets_a_guess(call, monkeypatch):
    large = {"fits": False, "hbm_gib_per_chip": 400.0, "guessed": True, "why": "x"}
    near = {"fits": True, "hbm_gib_per_chip": 9.0, "why": "a guess", "flags": "--f"}
    monkeypatch.setattr(search, "plan", lambda *_: large)
    monkeypatch.setattr(search, "nearest", lambda *_: near)
    with pytest.raises(UserError, match=r"400.00 GiB .*; --f fits: 9.00 GiB .*a guess"):
        call()


@pytest.mark.parametrize("nearest", [None, {"flags": "--mesh=data:2,fsdp:4", **FITS}])
def test_a_stage_that_does_not_fit_is_an_error(call, monkeypatch, nearest):
    large = {"fits": False, "hbm_gib_per_chip": 40.0, "why": "the compiler says"}

    def others(cfg, devices, tries, needed):
        assert needed == 40 and tries == 3
        yield {"fits": False}
        if nearest:
            yield nearest

    monkeypatch.setattr(search, "plan", lambda *_: large)
    monkeypatch.setattr(search, "compile_settings", others)
    advice = "fsdp:4 fits: 6.50" if nearest else "take more chips"
    with pytest.raises(
        UserError, match=f"does not fit: 40.00 GiB a chip .*; .*{advice}"
    ):
        call()
    assert not call.written["fits"] and call.written["hbm_gib_per_chip"] == 40
    assert call.written["nearest"] == nearest


def test_a_search_ranks_what_it_compiles(call, monkeypatch):
    rows = [
        {"flags": "slow", **FITS},
        {"flags": "large", "fits": False},
        {"flags": "fast", **FITS, "step_seconds": 0.125},
    ]
    monkeypatch.setattr(search, "compile_settings", lambda *_: iter(rows))
    written = call(search=True)
    assert [row["flags"] for row in written["settings"]] == ["fast", "slow", "large"]
    assert written["flags"] == "fast" and written["step_seconds"] == 0.125
    monkeypatch.setattr(search, "compile_settings", lambda *_: iter([]))
    with pytest.raises(UserError, match="nothing that fits was found; take more chips"):
        call(search=True)
    assert call.written["settings"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v4-521"}, "did you mean 'v4-512'"),
        ({"mesh": "fsdp:3"}, "the product must be 8"),
        ({"mesh": "fdsp:4"}, "mesh.fdsp does not exist .did you mean 'fsdp'"),
        ({"mesh": "fsdp=2"}, "as data:-1,fsdp:16"),
        ({"mesh": "fsdp"}, "not a list of axes"),
        ({"mesh": "fsdp:4.0"}, "not a list of axes"),
        ({"mesh": ""}, "not a list of axes"),
        ({"json": "configs"}, "name a file in a folder that exists"),
        ({"search": True, "what": "sample"}, "--search is for training"),
    ],
)
def test_bad_calls(call, changes, message):
    with pytest.raises(UserError, match=message):
        call(**changes)


def test_figures_are_read_by_people():
    text = cli.table({"chips": 1024, "mesh": {"fsdp": 8}, "share": 0.25, "days": None})
    assert [line.split() for line in text.splitlines()] == [
        ["chips", "1,024"],
        ["mesh"],
        ["fsdp", "8"],
        ["share", "0.25"],
        ["days", "-"],
    ]
