import ml_dtypes
import numpy as np
import pytest

from imagen_jax.batch import pad_text
from imagen_jax.errors import UserError
from imagen_jax.text import encoders as text

ENCODER = text.TinyEncoder()


def test_load_encoder():
    assert text.load_encoder("tiny").identity == ENCODER.identity
    assert text.load_encoder(ENCODER.identity).dim == 64
    with pytest.raises(UserError, match=r"'tinny' \(did you mean 'tiny'\?\); there is"):
        text.load_encoder("tinny")
    with pytest.raises(UserError, match="tiny@v0.*here is 'tiny@v2"):
        text.load_encoder("tiny@v0")
    with pytest.raises(UserError, match="built-in weights .*leave out .*x.npz"):
        text.load_encoder("tiny", "x.npz")


def test_padded():
    rows, mask = pad_text(ENCODER.encode(["red", "a red ring"], 6), 6, 64)
    assert rows.shape == (2, 6, 64) and rows.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(mask.sum(1), [2, 4])
    assert not rows[~mask].any() and rows[mask].any(-1).all()
