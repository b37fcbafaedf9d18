"""Cascades of tiny denoisers: who conditions whom, and what a picture depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import config, sharding
from imagen_jax.batch import to_float
from imagen_jax.config import MeshConfig
from imagen_jax.diffusion import cascade
from imagen_jax.diffusion.gaussian import expand
from imagen_jax.errors import UserError

PICTURES = 5


def _cfg(size, lowres_size=0, name="", **sampler):
    model = {
        "channels": (32,),
        "num_res_blocks": (1,),
        "self_attention": (False,),
        "text_attention": (False,),
    }
    values = {
        "name": name or f"to{size}",
        "image_size": size,
        "lowres_size": lowres_size,
        "model": model,
        "diffusion": {"prediction": "v"},
        "sampler": {"steps": 4, "batch_size": 2, "guidance": 1.5, **sampler},
    }
    return config.from_dict(values)


def _apply(cfg, params, z, logsnr, cond):
    """Looks at everything of its own picture, and at nothing else."""
    text = (cond.text * cond.mask[..., None]).sum((1, 2))
    out = params["scale"] * z + expand(text + 0.1 * logsnr, z)
    if cond.lowres is not None:
        big = jax.image.resize(cond.lowres, z.shape, "nearest")
        out = out - big * expand(1 + 0.01 * cond.aug_logsnr, z)
    return jnp.tanh(out)


PARAMS = {"scale": np.float32(0.7)}
BASE = cascade.Stage(PARAMS, _cfg(4), _apply)
SR = cascade.Stage(PARAMS, _cfg(8, 4), _apply)


def _mesh(devices=1, **axes):
    return sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return {
        "text": rng.normal(size=(PICTURES, 3, 4)).astype(np.float32),
        "mask": np.arange(3) < np.array([3, 0, 2, 1, 2])[:, None],
        "seeds": np.array([7, 3, 2**32 - 1, 0, 8]),
    }


def _take(inputs, rows):
    return {name: values[rows] for name, values in inputs.items()}


@pytest.fixture(scope="module")
def pictures(inputs):
    """Five pictures in batches of two: the last one is filled up."""
    return cascade.sample_cascade([BASE, SR], **inputs, mesh=_mesh())


def test_shapes_and_report(inputs, pictures):
    shapes = [(PICTURES, 4, 4, 3), (PICTURES, 8, 8, 3)]
    assert [p.shape for p in pictures] == shapes
    assert all(p.dtype == np.uint8 for p in pictures)
    seen = []
    cascade.sample_cascade([BASE, SR], **inputs, mesh=_mesh(), report=seen.append)
    assert seen == [2, 2, 1] * 2


@pytest.mark.parametrize("row", range(PICTURES))
def test_a_picture_alone_is_the_same(inputs, pictures, row):
    """By its seed and text, in the program of the same batch size: to the bit."""
    one = cascade.sample_cascade([BASE, SR], **_take(inputs, [row]), mesh=_mesh())
    for alone, among in zip(one, pictures):
        np.testing.assert_array_equal(alone[0], among[row])


def test_seed_and_text_matter(inputs, pictures):
    for name in inputs:
        other = {**inputs, name: inputs[name][::-1]}
        made = cascade.sample_cascade([BASE, SR], **other, mesh=_mesh())
        # The third picture keeps its place, and the second masks all of its text.
        want = [False, name == "text", True, False, False]
        for have, before in zip(made, pictures):
            assert (have == before).all((1, 2, 3)).tolist() == want, name


def test_entering_midway(inputs, pictures):
    (made,) = cascade.sample_cascade([SR], **inputs, mesh=_mesh(), lowres=pictures[0])
    np.testing.assert_array_equal(made, pictures[1])
    (other,) = cascade.sample_cascade(
        [SR], **inputs, mesh=_mesh(), lowres=255 - pictures[0]
    )
    assert (other != made).any((1, 2, 3)).all()


def test_stages_draw_their_own_noise():
    """The same network at the same settings, but for its size."""

    def first(cfg, params, z, logsnr, cond):
        return z

    inputs = {
        "text": np.zeros((2, 1, 1), np.float32),
        "mask": np.zeros((2, 1), bool),
        "seeds": np.array([0, 1]),
    }
    noise = []
    for size in (32, 64):
        cfg = _cfg(size, steps=1, guidance=1.0, threshold="none")
        cfg = dataclasses.replace(
            cfg, diffusion=config.DiffusionConfig(prediction="x0")
        )
        (made,) = cascade.sample_cascade(
            [cascade.Stage({}, cfg, first)], **inputs, mesh=_mesh()
        )
        # Numbers are drawn in the order of the pixels. Clipping leaves their signs.
        noise += [made.reshape(2, -1)[:, : 32 * 32 * 3]]
    rows = np.concatenate(noise)
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 5 / np.sqrt(32 * 32 * 3)


def test_the_next_stage_sees_the_announced_augmentation(inputs):
    """Of a grey picture only the noise is left: its scale is that of `aug_level`."""
    level = 0.5  # sigma**2 = 0.5
    seen = []

    def record(cfg, params, z, logsnr, cond):
        jax.debug.callback(lambda *a: seen.append(a), cond.lowres, cond.aug_logsnr)
        return z

    cfg = _cfg(64, 32, steps=1, guidance=1.0, aug_level=level)
    lowres = np.full((PICTURES, 32, 32, 3), 128, np.uint8)
    stage = cascade.Stage({}, cfg, record)
    cascade.sample_cascade([stage], **inputs, mesh=_mesh(), lowres=lowres)
    jax.effects_barrier()
    assert len(seen) == 3
    grey = float(to_float(jnp.uint8(128)))
    for noised, logsnr in seen:
        np.testing.assert_allclose(logsnr, 0, atol=1e-6)
        noise = np.asarray(noised) - 0.5**0.5 * grey
        assert abs(noise.var() / 0.5 - 1) < 4 * np.sqrt(2 / noise.size)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_of_eight_makes_the_same_pictures(inputs, pictures, axes):
    mesh = _mesh(8, **axes)
    stages = [
        stage.replace(params=jax.device_put(PARAMS, sharding.replicated(mesh)))
        for stage in (BASE, SR)
    ]
    # The base's pictures are handed over, so that a rounding does not travel.
    starts = [([stages[0]], None), ([stages[1]], pictures[0])]
    for (stage, lowres), want in zip(starts, pictures):
        (made,) = cascade.sample_cascade(stage, **inputs, mesh=mesh, lowres=lowres)
        # Other shapes are other programs: a value between two levels may fall to
        # either, one in some ten thousand.
        difference = np.abs(made.astype(int) - want)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_check_order_accepts_a_cascade():
    cascade.check_order([_cfg(64), _cfg(256, 64), _cfg(1024, 256)])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(256, 64)], r"stage 1 \(to256\) takes 64 .* nothing comes before it"),
        ([(64, 0), (1024, 256)], r"stage 2 \(to1024\) takes 256 .* makes 64"),
        ([(256, 64), (64, 0)], "base first"),
        ([(64, 0), (64, 0)], r"stage 2 \(to64\) takes no pixel .* makes 64"),
        ([(64, 0), (256, 64), (256, 64)], r"stage 3 .* makes 256"),
    ],
)
def test_check_order_says_what_does_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        cascade.check_order([_cfg(*size) for size in sizes])
