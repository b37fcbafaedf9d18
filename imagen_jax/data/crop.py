"""Where a square lies in its picture, a crop in the square, and what is mirrored."""

from typing import Any

from imagen_jax.config import StageConfig

PRIME = 2**31 - 1


def crop_corner(cfg: StageConfig, ids, epoch) -> tuple[Any, Any]:
    """Row and column of the crop's upper left pixel.

    A function of (data.seed, id, epoch), so that a resumed run and any source of
    the same pictures cut the same squares. Only the operators `+ * %`: numpy and
    TensorFlow get the same integers.

    Args:
      cfg: crops lie on multiples of image_size / lowres_size pixels, so that their
        low-resolution picture is a crop of the whole picture's.
      ids: `[...]` int64, of the examples.
      epoch: `[...]` or `[]` int64.

    Returns:
      two `[...]` int64 arrays in [0, image_size - crop_size].
    """
    step = cfg.image_size // cfg.lowres_size if cfg.lowres_size else 1
    places = (cfg.image_size - cfg.crop_size) // step + 1
    return tuple(
        draw(cfg.data.seed, ids, epoch, axis) % places * step for axis in (0, 1)
    )


def square_corner(cfg: StageConfig, ids, epoch, extra) -> Any:
    """Where in its longer side the square of a picture begins.

    The middle one, or with data.square "random" a function of (data.seed, id, epoch):
    every epoch another, and in all stages of one seed the same.

    Args:
      cfg: the stage.
      ids: `[...]` int64, of the examples.
      epoch: `[...]` or `[]` int64.
      extra: `[...]` int64, pixels by which the longer side is longer.

    Returns:
      `[...]` int64 in [0, extra].
    """
    if cfg.data.square == "middle":
        return extra // 2
    return draw(cfg.data.seed, ids, epoch, 2) % (extra + 1)


def is_flipped(cfg: StageConfig, ids, epoch) -> Any:
    """Whether with data.flip pictures are mirrored: `[...]` bool.

    Half of them, a function of (data.seed, id, epoch), in all stages of one seed alike.

    Args:
      cfg: the stage.
      ids: `[...]` int64, of the examples.
      epoch: `[...]` or `[]` int64.
    """
    return draw(cfg.data.seed, ids, epoch, 3) % 2 == 1


def draw(seed: int, numbers, epoch, purpose) -> Any:
    """`[...]` int64 in [0, PRIME), even, a function of the four; all are int64.

    Only the operators `+ * %`, as in `crop_corner`.
    """
    mixed = numbers * 0 + seed % PRIME
    for value in (numbers, epoch, purpose):
        mixed = (mixed * 48_271 + value % PRIME + 1) % PRIME
        # x**5 permutes the residues of this prime; products stay below 2**62.
        square = mixed * mixed % PRIME
        mixed = square * square % PRIME * mixed % PRIME
    return mixed
