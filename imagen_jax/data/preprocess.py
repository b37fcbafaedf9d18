"""Encoded pictures to the pixels of a stage, in TensorFlow.

All stages see the same picture: it is brought once to the largest size that is a
power of two times the stage's, and from there down by exact halvings. As the sizes
of a cascade's stages are powers of two apart, they share that first size.
"""

from collections.abc import Callable

import tensorflow as tf

from imagen_jax.config import StageConfig
from imagen_jax.data.crop import crop_corner
from imagen_jax.text import embeddings


def decode(data: tf.Tensor) -> tf.Tensor:
    """JPEG or PNG bytes to `[H, W, 3]` uint8."""
    # The op reads PNG too; only under this name does it take the accurate DCT.
    return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")


def picture(
    data: tf.Tensor,
    image_size: int,
    corner: Callable[[tf.Tensor], tf.Tensor] = lambda extra: extra // 2,
) -> tf.Tensor:
    """The picture of a stage: the middle square, or another, at `image_size`.

    The one resize that is no halving has a ratio below 2 and averages over areas: no
    ringing, no aliasing, the mean is kept, and it is the filter of the halvings.

    Args:
      data: `[]` string, JPEG or PNG, its shorter side at least `image_size`.
      image_size: pixels of the result's sides.
      corner: given by how many pixels the longer side is longer, the first of them
        that the square has.

    Returns:
      `[image_size, image_size, 3]` uint8.
    """
    image = decode(data)
    shape = tf.shape(image, out_type=tf.int64)
    side = tf.minimum(shape[0], shape[1])
    tf.debugging.assert_greater_equal(
        side, tf.constant(image_size, tf.int64), "a picture is too small for the stage"
    )
    top, left = corner(shape[0] - side), corner(shape[1] - side)
    image = image[top : top + side, left : left + side]
    side = tf.cast(side, tf.int32)
    # The shift count: how many of image_size * 2, * 4, ... fit into the side.
    doubled = tf.constant([image_size * 2**k for k in range(1, 16)])
    halvings = tf.reduce_sum(tf.cast(doubled <= side, tf.int32))
    size = tf.bitwise.left_shift(image_size, halvings)
    image = tf.image.resize(image, [size, size], method="area")
    image = tf.round(image)
    image = tf.while_loop(
        lambda image: tf.shape(image)[0] > image_size,
        lambda image: [_halve(image)],
        [image],
        shape_invariants=[tf.TensorShape([None, None, 3])],
    )[0]
    return tf.ensure_shape(tf.cast(image, tf.uint8), [image_size, image_size, 3])


def _halve(image):
    # The integers of `imagen_jax.batch.downsample`: a float32 holds the sum of four
    # bytes and its quarter exactly, and tf.round is half to even. Twelve times
    # faster than integer operations.
    return tf.round(tf.nn.avg_pool2d(image[None], 2, 2, "VALID")[0])


def crop(image: tf.Tensor, cfg: StageConfig, id: tf.Tensor, epoch: tf.Tensor):
    """`[S, S, 3]` to the training crop `[crop_size, crop_size, 3]` of (id, epoch)."""
    top, left = crop_corner(cfg, id, epoch)
    size = cfg.crop_size
    return tf.ensure_shape(image[top : top + size, left : left + size], [size, size, 3])


def padded_text(
    data: tf.Tensor, length: int, dim: int, dtype: str = "bfloat16"
) -> tuple[tf.Tensor, tf.Tensor]:
    """The bytes of `embeddings.to_bytes` to what `imagen_jax.batch.pad_text` makes.

    Args:
      data: `[]` string.
      length: tokens after padding or cutting.
      dim: width of a token.
      dtype: in which `data` holds it, one of `embeddings.DTYPES`.

    Returns:
      `[length, dim]` bfloat16 and `[length]` bool.
    """
    if dtype == "bfloat16":
        values = tf.bitcast(tf.io.decode_raw(data, tf.uint16), tf.bfloat16)
        rows = tf.reshape(values, [-1, dim])[:length]
    else:
        raw = tf.io.decode_raw(data, tf.uint8)
        raw = tf.reshape(raw, [-1, embeddings.SCALE_BYTES + dim])[:length]
        scale = tf.bitcast(raw[:, : embeddings.SCALE_BYTES], tf.float32)
        values = tf.bitcast(raw[:, embeddings.SCALE_BYTES :], tf.int8)
        rows = tf.cast(values, tf.float32) * scale[:, None]
        rows = tf.cast(rows, tf.bfloat16)
    n = tf.shape(rows)[0]
    text = tf.pad(rows, [[0, length - n], [0, 0]])
    return tf.ensure_shape(text, [length, dim]), tf.range(length) < n
