"""Programs for GPUs that are absent: what their text must not show, and their plans."""

import re

import jax
import pytest

from imagen_jax import config
from imagen_jax.config import MeshConfig
from imagen_jax.configs import base64
from imagen_jax.planning.chips import CHIPS, slice_devices
from imagen_jax.planning.compile import compile_sampling, compile_step
from imagen_jax.planning.program import arrays, forward_flops
from imagen_jax.sharding import make_mesh

pytest.importorskip("jax_cuda12_plugin", reason="pip install 'imagen-jax[plan-gpu]'")


@pytest.fixture(scope="module")
def cfg():
    """The base's attention of 32 x 32 pixels and 128 tokens, in one level."""
    values = base64.get_config("300m").to_dict()
    values["image_size"] = 32
    values["training"]["batch_size"] = 16
    values["text"]["dim"] = 128
    values["model"] |= {
        "channels": (128,),
        "num_res_blocks": (1,),
        "self_attention": (True,),
        "text_attention": (True,),
        "text_features": 128,
    }
    return config.from_dict(values)


@pytest.fixture(scope="module")
def one(cfg):
    return compile_step(cfg, make_mesh(MeshConfig(), slice_devices("h100-1")))


@pytest.fixture(scope="module")
def eight(cfg):
    return compile_step(cfg, make_mesh(MeshConfig(fsdp=8), slice_devices("h100-8")))


@pytest.mark.slow
def test_logits_do_not_reach_the_memory(one):
    text = one[0].as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert not re.search(r"\[\d+,[\d,]*1024,1152\]", text)


@pytest.mark.slow
def test_adafactors_placeholders_are_not_copied(one):
    assert not re.search(r"= f32\[1\]\{0\} copy", one[0].as_text())


@pytest.mark.slow
def test_weights_are_gathered_in_bfloat16(eight):
    text = eight[0].as_text()
    gathered = "".join(re.findall(r" = (.*) all-gather(?:-start)?\(", text))

    def size(dtype):
        shapes = re.findall(rf"\b{dtype}\[[\d,]+\]", gathered)
        return sum(size for size, _ in arrays("".join(shapes)))

    assert size("bf16") > 0 == size("f32")
    # Heads, of attention, are computed where their rows are.
    assert "__cudnn$fmhaSoftmaxBackward" in text


@pytest.mark.slow
def test_a_plan_for_gpus(cfg, one, eight):
    chip, rows = CHIPS["NVIDIA H100 80GB HBM3"], 16
    for (run, found), chips in ((one, 1), (eight, 8)):
        assert found["chip"] == "NVIDIA H100 80GB HBM3" and found["fits"]
        assert found["chips"] == chips
        memory = run.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        assert found["hbm_gib_per_chip"] * 2**30 == pytest.approx(held, rel=0.01)
        # cuDNN's and cuBLAS's calls are counted by what was traced.
        network = 3 * forward_flops(cfg) * rows / chips
        assert 0.9 < found["flops_per_chip"] / network < 1.1
        compute = found["roofline"]["compute_seconds"]
        assert compute == found["flops_per_chip"] / chip.flops
        assert found["network_bytes_per_chip"] == 0
        assert found["chip_hours"] == pytest.approx(24 * chips * found["days"])
    assert not one[1]["collectives"]
    sent = eight[1]["collective_bytes_per_chip"]
    assert eight[1]["roofline"]["interconnect_seconds"] == sent / chip.link > 0


@pytest.mark.slow
def test_two_boxes_and_a_sampler(cfg):
    """Each image of a sampler is on one GPU: nothing is sent between boxes."""
    mesh = make_mesh(MeshConfig(), slice_devices("a100-16"))
    found = compile_sampling(cfg, mesh)[1]
    assert found["chips"] == 16 and found["network_bytes_per_chip"] == 0
    jax.clear_caches()
