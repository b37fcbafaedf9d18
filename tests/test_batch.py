"""Arrays that travel between rooms, and images made smaller in exact arithmetic."""

import fractions

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax import batch as batches
from imagen_jax import config
from imagen_jax.errors import UserError


def _image(size, *lead):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (*lead, size, size, 3), np.uint8)


def _halve_exactly(image):
    """2 x 2 means as fractions; Python rounds those half to even."""
    side = len(image) // 2
    out = np.zeros((side, side, 3), np.uint8)
    for i, j, c in np.ndindex(out.shape):
        quad = image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        out[i, j, c] = round(fractions.Fraction(int(quad.sum(dtype=int)), 4))
    return out


def test_downsample_rounds_half_to_even():
    # Every sum that four pixels can have: 0 to 1020.
    sums = np.arange(1021)
    quads = np.stack([(sums + k) // 4 for k in range(4)], -1).astype(np.uint8)
    assert (quads.sum(-1, dtype=int) == sums).all()
    image = quads.reshape(-1, 2, 2, 1).repeat(3, -1)
    have = batches.downsample(image, 1)[:, 0, 0, 0]
    assert have.tolist() == [round(fractions.Fraction(int(s), 4)) for s in sums]


def test_downsample_takes_its_own_quads():
    image = _image(8)
    half = _halve_exactly(image)
    np.testing.assert_array_equal(batches.downsample(image, 4), half)
    np.testing.assert_array_equal(batches.downsample(image, 2), _halve_exactly(half))
    np.testing.assert_array_equal(batches.downsample(image, 8), image)


def test_downsample_is_the_same_on_host_and_device():
    image = _image(16, 2, 3)
    host = batches.downsample(image, 4)
    device = jax.jit(batches.downsample, static_argnums=1)(image, 4)
    assert isinstance(host, np.ndarray) and isinstance(device, jax.Array)
    assert host.shape == device.shape == (2, 3, 4, 4, 3)
    assert host.dtype == device.dtype == np.uint8
    np.testing.assert_array_equal(host, device)


def test_downsample_in_stages_is_the_same():
    image = _image(64, 2)
    stages = batches.downsample(batches.downsample(image, 32), 16)
    np.testing.assert_array_equal(stages, batches.downsample(image, 16))


@pytest.mark.parametrize(("size", "to"), [(12, 5), (12, 4), (8, 16)])
def test_downsample_refuses_what_is_not_halving(size, to):
    with pytest.raises(UserError, match=f"halve a {size} pixel image down to {to} "):
        batches.downsample(_image(size), to)


def test_to_float_and_back():
    levels = np.arange(256, dtype=np.uint8)
    values = batches.to_float(levels)
    assert values.dtype == jnp.float32
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(values, (levels - 127.5) / 127.5, atol=2 * eps)
    assert values[0] == -1 and values[-1] == 1
    back = batches.to_uint8(values)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, levels)
    # Whatever is out of range is clipped, what is between is rounded.
    clipped = batches.to_uint8(jnp.array([-7.0, -1.001, 1.001, 7.0]))
    assert clipped.tolist() == [0, 0, 255, 255]
    for shift in (-0.49, 0.49):
        near = batches.to_uint8(values + shift / 127.5)
        np.testing.assert_array_equal(near, levels)


def test_pad_text_pads_and_cuts():
    rows = [np.full((n, 2), n, np.float32) for n in (1, 3, 5, 0)]
    text, mask = batches.pad_text(rows, 3, 2)
    assert text.dtype == ml_dtypes.bfloat16 and mask.dtype == np.bool_
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert text[..., 0].tolist() == [[1, 0, 0], [3, 3, 3], [5, 5, 5], [0, 0, 0]]


SPEC_OF = {
    "image_size": 64,
    "lowres_size": 16,
    "crop_size": 32,
    "text": {"length": 5, "dim": 6},
    "training": {"batch_size": 4},
}


def _batch(**changes):
    fields = {
        "image": np.zeros((4, 32, 32, 3), np.uint8),
        "text": np.zeros((4, 5, 6), ml_dtypes.bfloat16),
        "mask": np.zeros((4, 5), np.bool_),
        "id": np.zeros(4, np.int32),
    }
    return batches.Batch(**{**fields, **changes})


def test_batch_spec_is_that_of_the_crop():
    spec = batches.batch_spec(config.from_dict(SPEC_OF))
    batches.check_batch(_batch(), spec)
    assert spec.image.shape == (4, 32, 32, 3)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("image", (4, 64, 64, 3), np.uint8),
        ("image", (4, 32, 32, 3), np.float32),
        ("text", (4, 5, 7), ml_dtypes.bfloat16),
        ("mask", (4, 5), np.int32),
        ("id", (3,), np.int32),
    ],
)
def test_check_batch_names_the_field(name, shape, dtype):
    spec = batches.batch_spec(config.from_dict(SPEC_OF))
    batch = _batch(**{name: np.zeros(shape, dtype)})
    with pytest.raises(UserError) as error:
        batches.check_batch(batch, spec)
    want = getattr(spec, name)
    message = str(error.value)
    assert message.startswith(f"batch.{name} is {np.dtype(dtype)}{list(shape)}")
    assert f"{want.dtype}{list(want.shape)}" in message


@pytest.mark.parametrize("name", ["length", "dim"])
def test_text_without_records_needs_its_shape(name):
    cfg = config.from_dict({**SPEC_OF, "text": {"length": 5, "dim": 6, name: 0}})
    with pytest.raises(UserError, match=f"config.text.{name} is 0, the records' value"):
        batches.batch_spec(cfg)


def test_a_mistyped_field_fails():
    with pytest.raises(TypeError, match="low_res"):
        batches.Cond(text=None, mask=None).replace(low_res=None)
