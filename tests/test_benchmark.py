"""The benchmark door: its figures are those of the program that it measures."""

import dataclasses
import json

import jax
import pytest

from imagen_jax import benchmark, config, prepare
from imagen_jax.api import run
from imagen_jax.planning.program import forward_flops
from imagen_jax.sharding import make_mesh
from imagen_jax.training.state import abstract_state
from tests import tiny


@pytest.fixture(scope="module")
def cfg():
    return tiny.sr_stage(model=tiny.ONE_LEVEL)


def test_params_are_all_counted(cfg):
    report = benchmark.params(cfg)
    mesh = make_mesh(cfg.mesh)
    params = jax.tree.leaves(abstract_state(cfg, mesh).params)
    assert report["parameters"] == sum(leaf.size for leaf in params)
    assert report["parameters"] == sum(report["blocks"].values())
    assert report["leaves"] == len(params)


@pytest.mark.slow
def test_timed_steps_agree_with_themselves(cfg, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_flops_per_second", lambda *_: 1e10)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    report = benchmark.time_steps(cfg, mesh, seconds=0)
    seconds = report["step_seconds"]
    assert seconds["min"] <= seconds["median"] <= seconds["max"]
    rate = report["images_per_second"]
    assert rate == pytest.approx(cfg.training.batch_size / seconds["median"])
    done = 3 * forward_flops(cfg) * rate
    assert report["share_of_matmul"] == pytest.approx(done / (1e10 * mesh.size))
    assert json.loads(json.dumps(report)) == report


@pytest.mark.slow
def test_a_timed_sampler_agrees_with_itself(cfg):
    """Of four steps three are guided; 6 pictures make two for each of 8 devices."""
    sampler = {"steps": 4, "guidance_schedule": [1.0, 2.0, 2.0, 2.0], "batch_size": 6}
    mesh = make_mesh(config.MeshConfig())
    report = benchmark.time_sampler(
        tiny.sr_stage(model=tiny.ONE_LEVEL, sampler=sampler), mesh, 0
    )
    assert report["batch_size"] == 8 and report["network_passes"] == 7
    seconds = report["batch_seconds"]
    assert seconds["min"] <= seconds["median"] <= seconds["max"]
    assert report["images_per_second"] == pytest.approx(8 / seconds["median"])
    outside = report["outside_seconds_per_image_and_step"] * 8 * 4
    inside = report["pass_seconds_per_image"] * 8 * 7
    assert outside + inside == pytest.approx(seconds["median"])
    assert report["share_outside_the_network"] == pytest.approx(
        outside / seconds["median"]
    )
    assert json.loads(json.dumps(report)) == report


@pytest.mark.slow
def test_a_timed_pipeline_agrees_with_itself(tmp_path):
    records = str(tmp_path / "records.npz")
    prepare.prepare("shapes:32", records, text_length=4, image_size=8, progress=False)
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL,
        text={"dim": 64, "encoder": ""},
        data={"records": records},
    )
    cfg = run.resolve(dataclasses.asdict(cfg))
    report = benchmark.time_data(cfg, make_mesh(cfg.mesh, jax.devices()[:1]), seconds=0)
    assert report["batch_size"] == 8
    assert report["batches"] >= 3 and report["training_steps"] >= 3
    assert 0 <= report["share_of_the_step_waiting"] <= 1
    waited = report["wait_seconds_per_step"] * report["training_steps_per_second"]
    assert report["share_of_the_step_waiting"] == pytest.approx(waited)
    assert report["queues_gib"] >= 0
    assert json.loads(json.dumps(report)) == report
