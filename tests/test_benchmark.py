"""The benchmark door: its figures are those of the program that it measures."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from configs import base64, sr256
from imagen_jax import config, prepare, timings
from imagen_jax.api import run
from imagen_jax.models import network
from imagen_jax.planning import compile as compiled
from imagen_jax.planning import flops
from imagen_jax.sharding import make_mesh
from imagen_jax.training.state import abstract_state
from tests import tiny


@pytest.fixture(scope="module")
def cfg():
    return tiny.sr_stage(model=tiny.ONE_LEVEL)


def test_arithmetic_is_counted_by_hand():
    def run(x, kernel, matrix):
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        body = jax.checkpoint(lambda x, _: (jnp.tanh(x @ matrix), None))
        return jax.lax.scan(body, x, length=5)[0]

    shapes = [(2, 8, 8, 3), (3, 3, 3, 16), (16, 16)]
    jaxpr = jax.make_jaxpr(run)(*map(jnp.zeros, shapes))
    conv = 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)
    products = 5 * 2 * (2 * 4 * 4 * 16) * 16
    assert flops.count(jaxpr.jaxpr) == conv + products


@pytest.mark.parametrize("module", [base64, sr256])
def test_arithmetic_is_near_the_compilers_own_count(module):
    """Which leaves out what padding adds, and adds what is done to single elements."""
    cfg = config.from_dict(module.get_config("tiny").to_dict())
    ours = flops.forward_flops(cfg)
    loops = dataclasses.replace(cfg.model, scan_blocks=True)
    assert ours == flops.forward_flops(dataclasses.replace(cfg, model=loops))
    run = jax.jit(network.apply, static_argnums=0)
    lowered = run.lower(cfg.model, *network.abstract_inputs(cfg))
    theirs = lowered.cost_analysis()["flops"]
    # Of 3 x 3 pixels around each of 4 x 4, the coarsest level, so many are inside.
    inside = (10 / 12) ** 2
    assert inside < theirs / ours < 1.1


def test_params_are_all_counted(cfg):
    report = compiled.params(cfg)
    mesh = make_mesh(cfg.mesh)
    params = jax.tree.leaves(abstract_state(cfg, mesh).params)
    assert report["parameters"] == sum(leaf.size for leaf in params)
    assert report["parameters"] == sum(report["blocks"].values())
    assert report["leaves"] == len(params)


def test_a_compiled_step_needs_the_state_once(cfg):
    """Donated buffers: what goes in and comes out lies in the same place."""
    mesh = make_mesh(config.MeshConfig(data=2, fsdp=4))
    report = compiled.compile_step(cfg, mesh).report
    state = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(abstract_state(cfg, mesh))
    )
    gib = state / 2**30
    assert report["devices"] == 8
    assert report["outputs_in_place_of_arguments_gib"] == pytest.approx(gib, rel=1e-3)
    assert report["arguments_gib"] == pytest.approx(gib, rel=0.1)
    assert report["collectives"]["all-gather"]["count"] > 0
    # Products of the network, three times; of 4 x 4 pixels some meet padding.
    ours = 3 * flops.forward_flops(cfg) * cfg.training.batch_size / 8
    assert (10 / 12) ** 2 < report["matrix_flops"] / ours < 1.1


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
def test_a_step_that_does_not_fit_is_a_message(cfg, monkeypatch, message, gib):
    """As the compiler of a TPU ends then; a CPU has no limit that it checks."""

    class Lowered:
        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compiled, "compile_train_step", lambda *_: Lowered())
    mesh = make_mesh(cfg.mesh)
    with pytest.raises(compiled.DoesNotFit, match=r"not fit.* 8 devices") as raised:
        compiled.compile_step(cfg, mesh)
    assert raised.value.needed_gib == gib
    assert "\n" not in str(raised.value)


def test_the_largest_array():
    """By its bytes: 1,200 of 300 elements, beside 1,024 of 512 and of 1,024."""
    program = "%a = bf16[8,64]{1,0} add(f32[3,10,10]{2,1,0} %b, u8[1024]{0} %c)"
    assert compiled.largest_array(program) == "f32[3,10,10]"


def test_timed_steps_agree_with_themselves(cfg, monkeypatch):
    monkeypatch.setattr(timings, "matmul_flops_per_second", lambda *_: 1e10)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    report = timings.time_steps(cfg, mesh, seconds=0)
    seconds = report["step_seconds"]
    assert seconds["min"] <= seconds["median"] <= seconds["max"]
    rate = report["images_per_second"]
    assert rate == pytest.approx(cfg.training.batch_size / seconds["median"])
    done = 3 * flops.forward_flops(cfg) * rate
    assert report["share_of_matmul"] == pytest.approx(done / (1e10 * mesh.size))
    assert json.loads(json.dumps(report)) == report


def test_a_timed_sampler_agrees_with_itself(cfg):
    """Of four steps three are guided; 6 pictures make two for each of 8 devices."""
    sampler = {"steps": 4, "guidance_schedule": [1.0, 2.0, 2.0, 2.0], "batch_size": 6}
    mesh = make_mesh(config.MeshConfig())
    report = timings.time_sampler(
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


def test_a_timed_pipeline_agrees_with_itself(tmp_path):
    records = str(tmp_path / "records.npz")
    prepare.prepare("shapes:32", records, text_length=4, image_size=8, progress=False)
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL,
        text={"dim": 64, "encoder": ""},
        data={"records": records},
    )
    cfg = run.resolve(dataclasses.asdict(cfg))
    report = timings.time_data(cfg, make_mesh(cfg.mesh, jax.devices()[:1]), seconds=0)
    assert report["batch_size"] == 8
    assert report["batches"] >= 3 and report["training_steps"] >= 3
    assert 0 <= report["share_of_the_step_waiting"] <= 1
    waited = report["wait_seconds_per_step"] * report["training_steps_per_second"]
    assert report["share_of_the_step_waiting"] == pytest.approx(waited)
    assert report["queues_gib"] >= 0
    batch = 8 * (8 * 8 * 3 + cfg.text.length * (64 * 2 + 1) + 4)
    assert report["queues_bound_gib"] == batch / 2**30
    assert json.loads(json.dumps(report)) == report
