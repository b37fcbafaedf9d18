"""Arrays that travel between rooms, and the one way images are made smaller."""

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from imagen_jax.config import StageConfig, TextConfig
from imagen_jax.errors import UserError


@flax.struct.dataclass
class Batch:
    """One training batch."""

    image: jax.Array  # [B, H, W, 3] uint8, at the stage's resolution or crop
    text: jax.Array  # [B, L, D] bfloat16, the captions' embeddings; zero where padded
    mask: jax.Array  # [B, L] bool, True where a token is real
    id: jax.Array  # [B] int32, the example's number in its records
    # [B] bytes, UTF-8, b"" where none is stored; on a host that reads, None elsewhere.
    caption: np.ndarray | None = None


@flax.struct.dataclass
class Cond:
    """What a network is conditioned on besides the noise level.

    The null text is zero embeddings and an all-False mask, everywhere. A base stage has
    no low-resolution image.
    """

    text: jax.Array  # [B, L, D] bfloat16 or float32
    mask: jax.Array  # [B, L] bool
    lowres: jax.Array | None = None  # [B, h, w, 3] float32, with augmentation noise
    aug_logsnr: jax.Array | None = None  # [B] float32, the log-SNR of that noise


def text_shape(cfg: TextConfig) -> tuple[int, int]:
    """Length and width `(L, D)` of a caption's embeddings.

    Raises:
      UserError: while one of them is 0, the records' value, and no records were read.
    """
    for name in ("length", "dim"):
        if not getattr(cfg, name):
            raise UserError(
                f"config.text.{name} is 0, the records' value, but no records are read "
                f"here: give --config.text.{name}=N"
            )
    return cfg.length, cfg.dim


def batch_spec(cfg: StageConfig) -> Batch:
    """Shapes and types of a global batch, without data."""
    b, size = cfg.training.batch_size, cfg.train_size
    length, dim = text_shape(cfg.text)
    return Batch(
        image=jax.ShapeDtypeStruct((b, size, size, 3), jnp.uint8),
        text=jax.ShapeDtypeStruct((b, length, dim), jnp.bfloat16),
        mask=jax.ShapeDtypeStruct((b, length), jnp.bool_),
        id=jax.ShapeDtypeStruct((b,), jnp.int32),
    )


def check_batch(batch: Batch, spec: Batch) -> None:
    """Raises `UserError`, naming the first field that does not fit `spec`."""
    for name in ("image", "text", "mask", "id"):
        have, want = getattr(batch, name), getattr(spec, name)
        if have.shape != want.shape or have.dtype != want.dtype:
            raise UserError(
                f"batch.{name} is {have.dtype}{list(have.shape)}, the config asks for "
                f"{want.dtype}{list(want.shape)}: were the records prepared for "
                "another text encoder?"
            )


def pad_text(
    rows: list[np.ndarray], length: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `[n_i, D]`, cut to `length`, as `[B, L, D]` bfloat16 and a mask."""
    text = np.zeros((len(rows), length, dim), ml_dtypes.bfloat16)
    mask = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        n = min(len(row), length)
        text[i, :n] = row[:n]
        mask[i, :n] = True
    return text, mask


def downsample(image, size: int):
    """Halves a uint8 image by 2x2 means, each rounded half to even, down to `size`.

    The arithmetic is that of integers, so hosts (numpy), devices (jax) and any sequence
    of stages agree to the bit: the low-resolution input of a super-resolution stage is
    what its base is trained on.

    Args:
      image: `[..., H, W, 3]`, numpy or jax, `H == W == size * 2**k`.
      size: side of the result, which is the same kind of array.
    """
    side = image.shape[-2]
    if side % size or (side // size) & (side // size - 1):
        raise UserError(f"cannot halve a {side} pixel image down to {size} pixels")
    while side > size:
        side //= 2
        lead = image.shape[:-3]
        quads = image.reshape(*lead, side, 2, side, 2, 3).astype("int32")
        total = quads.sum((-4, -2))
        image = ((total + 1 + ((total >> 2) & 1)) >> 2).astype("uint8")
    return image


def to_float(image: jax.Array) -> jax.Array:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x0: jax.Array) -> jax.Array:
    """float32 in [-1, 1] (clipped) to uint8 in [0, 255]; inverts `to_float`."""
    return jnp.round((jnp.clip(x0, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
