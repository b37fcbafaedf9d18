"""Cascades of tiny denoisers: who conditions whom, and what a picture depends on."""

import dataclasses
import weakref

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
    return _sample([BASE, SR], **inputs)


def _sample(stages, mesh=None, **inputs):
    made, _ = cascade.sample_cascade(stages, **inputs, mesh=mesh or _mesh())
    return made


def test_shapes_and_report(inputs, pictures):
    shapes = [(PICTURES, 4, 4, 3), (PICTURES, 8, 8, 3)]
    assert [p.shape for p in pictures] == shapes
    assert all(p.dtype == np.uint8 for p in pictures)
    seen = []
    _sample([BASE, SR], **inputs, report=seen.append)
    assert seen == [2, 2, 1] * 2


@pytest.mark.parametrize("row", range(PICTURES))
def test_a_picture_alone_is_the_same(inputs, pictures, row):
    """By its seed and text, in the program of the same batch size: to the bit."""
    batch = _sample([BASE, SR], **_take(inputs, [row, row]))
    one = _sample([BASE, SR], **_take(inputs, [row]))
    for twice, alone, among in zip(batch, one, pictures):
        np.testing.assert_array_equal(twice[0], among[row])
        np.testing.assert_array_equal(twice[1], among[row])
        # The program of one row: a value between two levels may fall to either.
        assert np.abs(alone[0].astype(int) - among[row]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "want"),
    [(1, 1, 1), (2, 1, 1), (3, 1, 16), (5, 1, 16), (1, 8, 8), (3, 8, 16)],
)
def test_programs_have_one_row_or_a_batch(inputs, count, devices, want):
    """Of few pictures each is made alone; one row for every shard of the mesh."""
    seen = set()

    def look(cfg, params, z, logsnr, cond):
        seen.add(len(z))
        return z

    cfg = _cfg(4, batch_size=16, guidance=1.0)
    stage, rows = cascade.Stage({}, cfg, look), np.arange(count)
    made = _sample([stage], _mesh(devices), **_take(inputs, rows))
    assert made[0].shape == (count, 4, 4, 3) and seen == {want}
    # One alone always is.
    assert (
        cascade.batch_rows(2, 1, _mesh()) == 1
        and cascade.batch_rows(2, 2, _mesh()) == 2
    )


def test_some_of_the_pictures_are_made_by_the_program_of_all(inputs, pictures):
    """In batches of two of the five: as after a kill."""
    given = cascade.Inputs(
        inputs["seeds"].astype(np.uint32),
        inputs["text"],
        inputs["mask"],
        *(own := cascade.Settings.of(BASE.cfg.sampler, PICTURES)),
        None,
    )
    asked, before = [], cascade.compile_sampler.cache_info().currsize

    def give(numbers):
        asked.append(numbers.tolist())
        return jax.tree.map(lambda a: a[numbers], given)

    left = np.array([1, 3, 4])
    batches = cascade.sample_stage(BASE, left, PICTURES, give, own, _mesh())
    for numbers, made, _ in batches:
        np.testing.assert_array_equal(made, pictures[0][numbers])
    assert asked == [[1, 3], [4]]
    assert cascade.compile_sampler.cache_info().currsize == before


def test_seed_and_text_matter(inputs, pictures):
    for name in inputs:
        other = {**inputs, name: inputs[name][::-1]}
        made = _sample([BASE, SR], **other)
        # The third picture keeps its place, and the second masks all of its text.
        want = [False, name == "text", True, False, False]
        for have, before in zip(made, pictures):
            assert (have == before).all((1, 2, 3)).tolist() == want, name


def test_entering_midway(inputs, pictures):
    (made,) = _sample([SR], **inputs, lowres=pictures[0])
    np.testing.assert_array_equal(made, pictures[1])
    (other,) = _sample([SR], **inputs, lowres=255 - pictures[0])
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
        (made,) = _sample([cascade.Stage({}, cfg, first)], **inputs)
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
    _sample([stage], **inputs, lowres=lowres)
    jax.effects_barrier()
    assert len(seen) == 3
    grey = float(to_float(jnp.uint8(128)))
    for noised, logsnr in seen:
        np.testing.assert_allclose(logsnr, 0, atol=1e-6)
        noise = np.asarray(noised) - 0.5**0.5 * grey
        assert abs(noise.var() / 0.5 - 1) < 4 * np.sqrt(2 / noise.size)


@pytest.mark.slow
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
        (made,) = _sample(stage, **inputs, mesh=mesh, lowres=lowres)
        # Other shapes are other programs: a value between two levels may fall to
        # either, one in some ten thousand.
        difference = np.abs(made.astype(int) - want)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
        # On other devices of the same program: to the bit.
        moved = np.array([3, 0, 4, 4, 1, 2])
        lowres = None if lowres is None else lowres[moved]
        (again,) = _sample(stage, **_take(inputs, moved), mesh=mesh, lowres=lowres)
        np.testing.assert_array_equal(again, made[moved])


def test_settings_of_one_picture_are_its_own(inputs, pictures):
    """Other weights and levels in one program, picture by picture, and no new one."""
    own = [cascade.Settings.of(stage.cfg.sampler, PICTURES) for stage in (BASE, SR)]
    own[0].guidance[1] = 4.0
    own[1].aug_level[2] = 0.9
    before = cascade.compile_sampler.cache_info().currsize
    made = _sample([BASE, SR], **inputs, settings=own)
    assert cascade.compile_sampler.cache_info().currsize == before
    changed = [(a != b).any((1, 2, 3)).tolist() for a, b in zip(made, pictures)]
    # The second picture masks all of its text: there is nothing to guide towards.
    masked = not inputs["mask"][1].any()
    assert masked and changed[0] == [False] * 5
    own[0].guidance[1] = 1.5
    own[0].guidance[3] = 4.0
    made = _sample([BASE, SR], **inputs, settings=own)
    changed = [(a != b).any((1, 2, 3)).tolist() for a, b in zip(made, pictures)]
    assert changed[0] == [False, False, False, True, False]
    assert changed[1] == [False, False, True, True, False]


def test_a_stage_is_made_when_the_one_before_is_gone(inputs, pictures):
    params = []

    def make(stage):
        assert all(ref() is None for ref in params), "the stage before is still held"
        made = jax.tree.map(jnp.asarray, PARAMS)
        params.append(weakref.ref(made["scale"]))
        return stage.replace(params=made)

    made = _sample((make(stage) for stage in (BASE, SR)), **inputs)
    assert len(params) == 2
    np.testing.assert_array_equal(made[1], pictures[1])


def test_recorded_estimates(inputs, pictures):
    """The last step's is the picture; earlier ones are those of fewer steps' view."""
    _, estimates = cascade.sample_cascade([BASE, SR], **inputs, mesh=_mesh())
    sides = [4, 8]
    assert [e.shape for e in estimates] == [(PICTURES, 0, n, n, 3) for n in sides]
    made, estimates = cascade.sample_cascade(
        [BASE, SR], **inputs, mesh=_mesh(), recorded_steps=(0, 3)
    )
    assert [e.shape for e in estimates] == [(PICTURES, 2, n, n, 3) for n in sides]
    for have, want, recorded in zip(made, pictures, estimates, strict=True):
        np.testing.assert_array_equal(have, want)
        np.testing.assert_array_equal(recorded[:, 1], have)
        assert (recorded[:, 0] != have).any((1, 2, 3)).all()


def test_steps_are_told(inputs):
    seen, shown = [], []

    def tell(step, estimate):
        seen.append(int(step))
        shown.append(np.asarray(estimate))

    own = cascade.Settings.of(SR.cfg.sampler, PICTURES)
    lowres = np.zeros((PICTURES, 4, 4, 3), np.uint8)
    seeds = inputs["seeds"].astype(np.uint32)
    given = cascade.Inputs(seeds, inputs["text"], inputs["mask"], *own, lowres)

    def give(numbers):
        return jax.tree.map(lambda a: a[numbers], given)

    everyone, mesh = np.arange(PICTURES), _mesh()
    batches = cascade.sample_stage(
        SR, everyone, PICTURES, give, own, mesh, on_step=tell
    )
    made = [images for _, images, _ in batches]
    jax.effects_barrier()
    # Five pictures in batches of two, four steps each.
    assert seen == [0, 1, 2, 3] * 3
    assert [len(images) for images in made] == [2, 2, 1]
    # The last estimate is the picture; a batch that is not full is filled up.
    for images, last in zip(made, shown[3::4]):
        np.testing.assert_array_equal(last[: len(images)], images)
    (want,) = _sample([SR], **inputs, lowres=lowres)
    np.testing.assert_array_equal(np.concatenate(made), want)


def test_check_order_accepts_a_cascade():
    cascade.check_order([_cfg(64), _cfg(256, 64), _cfg(1024, 256)])
    cascade.check_order([_cfg(256, 64), _cfg(1024, 256)], made=64)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(256, 64)], r"stage 1 \(to256\) takes 64 pixel .* before it makes no images"),
        ([(64, 0), (1024, 256)], r"stage 2 \(to1024\) takes 256 .* makes 64"),
        ([(256, 64), (64, 0)], "base first"),
        ([(64, 0), (64, 0)], r"stage 2 \(to64\) takes no images, .* makes 64"),
        ([(64, 0), (256, 64), (256, 64)], r"stage 3 .* makes 256"),
    ],
)
def test_check_order_says_what_does_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        cascade.check_order([_cfg(*size) for size in sizes])
