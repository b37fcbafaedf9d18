"""Encoded records to the examples of a stage, in TensorFlow.

All stages of a cascade see the same image: it is resized once to the largest size that
is a power of two times the stage's, and from there by exact halvings. As the sizes of
stages are powers of two apart, they share that first size.
"""

import functools
from collections.abc import Callable

import tensorflow as tf

from imagen_jax.config import StageConfig
from imagen_jax.data.order import crop_corner, is_flipped, square_start
from imagen_jax.text import embeddings


def example(cfg: StageConfig, row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """A record to the fields of a `Batch`, without the batch axis.

    `row` has "image", "text" and "caption" bytes, "id" and "epoch" int64, and "int8"
    bool, whether the text is stored as int8; all `[]`.
    """
    number = row["id"], row["epoch"]
    image = picture(
        row["image"], cfg.image_size, functools.partial(square_start, cfg, *number)
    )
    if cfg.crop_size:
        top, left = crop_corner(cfg, *number)
        image = image[top : top + cfg.crop_size, left : left + cfg.crop_size]
    if cfg.data.flip:
        image = tf.where(is_flipped(cfg, *number), image[:, ::-1], image)
    text, mask = tf.cond(
        row["int8"],
        lambda: padded_text(row["text"], cfg.text.length, cfg.text.dim, "int8"),
        lambda: padded_text(row["text"], cfg.text.length, cfg.text.dim, "bfloat16"),
    )
    return {
        "image": tf.ensure_shape(image, [cfg.train_size, cfg.train_size, 3]),
        "text": text,
        "mask": mask,
        "id": tf.cast(row["id"], tf.int32),
        "caption": row["caption"],
    }


def decode(data: tf.Tensor) -> tf.Tensor:
    """JPEG or PNG bytes to `[H, W, 3]` uint8."""
    # The op reads PNG too; only under this name does it take the accurate DCT.
    return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")


def sides(data: bytes) -> tuple[int, int] | None:
    """Width and height of a file as `decode` reads it; None if it cannot."""
    try:
        height, width, _ = decode(data).shape
    except tf.errors.OpError:
        return None
    return width, height


def picture(
    data: tf.Tensor,
    image_size: int,
    start: Callable[[tf.Tensor], tf.Tensor] = lambda extra: extra // 2,
) -> tf.Tensor:
    """A square of a JPEG or PNG: `[image_size, image_size, 3]` uint8.

    The one resize that is not a halving has a ratio below 2 and averages over areas: no
    ringing, no aliasing, the mean is kept, and it is the filter of the halvings.

    Given the pixels by which the longer side is longer, `start` is the first pixel of
    the square along it; the middle square by default.
    """
    image = decode(data)
    shape = tf.shape(image, out_type=tf.int64)
    side = tf.minimum(shape[0], shape[1])
    tf.debugging.assert_greater_equal(
        side, tf.constant(image_size, tf.int64), "an image is too small for the stage"
    )
    top, left = start(shape[0] - side), start(shape[1] - side)
    image = image[top : top + side, left : left + side]
    side = tf.cast(side, tf.int32)
    # How many of image_size * 2, * 4, ... fit into the side.
    doubled = tf.constant([image_size * 2**k for k in range(1, 16)])
    halvings = tf.reduce_sum(tf.cast(doubled <= side, tf.int32))
    size = tf.bitwise.left_shift(image_size, halvings)
    image = tf.round(tf.image.resize(image, [size, size], method="area"))
    # The integers of `batch.downsample`, twelve times faster: float32 holds the sum of
    # four bytes and its quarter exactly, and tf.round is half to even.
    image = tf.while_loop(
        lambda image: tf.shape(image)[0] > image_size,
        lambda image: [tf.round(tf.nn.avg_pool2d(image[None], 2, 2, "VALID")[0])],
        [image],
        shape_invariants=[tf.TensorShape([None, None, 3])],
    )[0]
    return tf.ensure_shape(tf.cast(image, tf.uint8), [image_size, image_size, 3])


def padded_text(
    data: tf.Tensor, length: int, dim: int, dtype: str
) -> tuple[tf.Tensor, tf.Tensor]:
    """`batch.pad_text` of one caption: `[length, dim]` bfloat16, `[length]` bool."""
    if dtype == "bfloat16":
        values = tf.bitcast(tf.io.decode_raw(data, tf.uint16), tf.bfloat16)
        rows = tf.reshape(values, [-1, dim])[:length]
    else:
        raw = tf.io.decode_raw(data, tf.uint8)
        raw = tf.reshape(raw, [-1, embeddings.SCALE_BYTES + dim])[:length]
        scale = tf.bitcast(raw[:, : embeddings.SCALE_BYTES], tf.float32)
        values = tf.bitcast(raw[:, embeddings.SCALE_BYTES :], tf.int8)
        rows = tf.cast(tf.cast(values, tf.float32) * scale[:, None], tf.bfloat16)
    n = tf.shape(rows)[0]
    text = tf.pad(rows, [[0, length - n], [0, 0]])
    return tf.ensure_shape(text, [length, dim]), tf.range(length) < n
