"""What a GPU computes, against the CPU beside it: `pytest -m gpu`, on a box with one.

On a computer without a GPU that command compares the CPU with itself; other runs of the
tests leave these out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import MeshConfig
from imagen_jax.diffusion import cascade
from imagen_jax.models import network
from imagen_jax.models.attention import attend
from imagen_jax.planning.compile import GIB, compile_step, sampler_inputs
from imagen_jax.sharding import batch_sharding, make_mesh, on_mesh
from imagen_jax.training.state import abstract_state
from imagen_jax.training.step import compile_train_step
from tests import tiny

pytestmark = pytest.mark.gpu

ATTENTION = {
    "channels": (32,),
    "num_res_blocks": (1,),
    "self_attention": (True,),
    "text_attention": (True,),
}


@pytest.fixture(autouse=True)
def asked_for(request):
    if jax.default_backend() != "gpu" and "gpu" not in request.config.option.markexpr:
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def whole_float32():
    """Without TF32, which has 10 bits of a product's 23."""
    with jax.default_matmul_precision("highest"):
        yield


def mesh(device):
    return make_mesh(MeshConfig(), [device])


def both():
    return mesh(jax.devices()[0]), mesh(jax.devices("cpu")[0])


def state(cfg, place):
    """The same on any device: drawn by numpy, with fresh moments."""
    params = tiny.params(cfg)
    like = abstract_state(cfg, place)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    made = zeros.replace(params=params, ema=params)
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), made, like)


def step(cfg, place):
    """Loss, gradient norm and parameters after one step."""
    batch = jax.device_put(tiny.batch(cfg), batch_sharding(place))
    after, metrics = compile_train_step(cfg, place)(state(cfg, place), batch)
    return metrics["loss"], metrics["gradient_norm"], jax.device_get(after.params)


@pytest.mark.parametrize("make", [tiny.stage, tiny.sr_stage])
def test_a_step_in_float32(make):
    cfg = make(model=ATTENTION, optimizer={"warmup_steps": 0, "learning_rate": 1e-3})
    (loss, norm, params), (loss_cpu, norm_cpu, params_cpu) = (
        step(cfg, place) for place in both()
    )
    assert float(loss) == pytest.approx(float(loss_cpu), rel=1e-5)
    assert float(norm) == pytest.approx(float(norm_cpu), rel=1e-4)
    # Adam's first step is the rate times a gradient's sign: some are nearly zero.
    apart = [
        np.abs(a - b).max() > 1e-5
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_cpu))
    ]
    assert np.mean(apart) < 0.2


def test_a_step_in_bfloat16():
    cfg = tiny.stage(model={**ATTENTION, "dtype": "bfloat16"})
    loss, norm, _ = step(cfg, both()[0])
    whole = tiny.stage(model=ATTENTION)
    loss_cpu, norm_cpu, _ = step(whole, both()[1])
    assert float(loss) == pytest.approx(float(loss_cpu), rel=0.02)
    assert float(norm) == pytest.approx(float(norm_cpu), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(dtype):
    """cuDNN's in bfloat16 and XLA's in float32, against XLA's on the CPU in float32."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, n, 2, 64)).astype("f4") for n in (256, 384, 384))
    mask = np.arange(384) < np.array([384, 300, 257, 0])[:, None]

    def loss(q, k, v, mask):
        return (attend(q, k, v, mask).astype(jnp.float32) ** 2).sum()

    def found(place, dtype):
        run = jax.jit(on_mesh(jax.value_and_grad(loss, (0, 1, 2)), place))
        args = (*(jnp.asarray(x, dtype) for x in (q, k, v)), mask)
        return jax.tree.leaves(run(*jax.device_put(args, batch_sharding(place))))

    gpu, cpu = both()
    bound = {"float32": 1e-5, "bfloat16": 0.03}[dtype]
    for have, want in zip(found(gpu, dtype), found(cpu, "float32"), strict=True):
        have, want = np.asarray(have, "f4"), np.asarray(want, "f4")
        assert np.isfinite(have).all()
        np.testing.assert_allclose(have, want, atol=bound * np.abs(want).max())


def test_a_sampler():
    cfg = tiny.sr_stage(model=ATTENTION, sampler={"steps": 3})

    def pictures(place):
        params = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding),
            tiny.params(cfg),
            abstract_state(cfg, place).params,
        )
        inputs = jax.device_put(sampler_inputs(cfg, place), batch_sharding(place))
        run = cascade.compile_sampler(network.apply, cfg, place)
        return np.asarray(run(params, *inputs)[0], int)

    apart = np.abs(np.subtract(*map(pictures, both())))
    assert (apart > 0).mean() < 0.01 and apart.max() <= 2


def test_planned_memory_is_what_is_used():
    place, cfg = both()[0], tiny.stage(model=ATTENTION, training={"batch_size": 256})
    device = place.devices.flat[0]
    if device.memory_stats() is None:
        pytest.skip("a CPU does not tell")
    run, planned = compile_step(cfg, place)
    batch = jax.device_put(tiny.batch(cfg), batch_sharding(place))
    jax.block_until_ready(run(state(cfg, place), batch))
    used = device.memory_stats()["peak_bytes_in_use"] / GIB
    # Other tests' arrays and cuDNN's workspaces are in it.
    assert 0.8 * planned["hbm_gib_per_chip"] < used
