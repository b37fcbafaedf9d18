"""One picture's file: is it whole, is it large enough, what is stored of it."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_EXIF_ORIENTATION = 0x0112
# Of these a resized picture is stored as JPEG: a PNG would be ten times as long and
# keep the losses of the first compression.
_LOSSY = ("JPEG", "MPO", "WEBP")
_JPEG = {"quality": 95, "subsampling": 0}
# A JPEG is decoded at a half, quarter or eighth if that leaves the filter at least
# this many times the stored size to work on.
_REDUCING_GAP = 3


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which pictures are kept, and how large.

    Attributes:
      min_side: pixels that the shorter side has at least.
      max_aspect: how many times as long as the shorter side the longer one is at
        most; 0 is no limit.
      stored_size: pixels to which the shorter side is reduced; pictures are never
        enlarged. 0 keeps all pixels.
    """

    min_side: int = 1
    max_aspect: float = 0
    stored_size: int = 0

    def at_least(self, size: int) -> "Rules":
        """The same, of pictures that have `size` pixels."""
        return dataclasses.replace(self, min_side=max(size, self.min_side))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that is known to decode.

    Attributes:
      data: its JPEG or PNG file.
      side: pixels of its shorter side.
      reencoded: whether `data` is a file made here, not the file's own bytes.
    """

    data: bytes
    side: int
    reencoded: bool


class BrokenPicture(Exception):
    """The bytes are no picture that can be used; the text says why."""


def verify(data: bytes, rules: Rules = Rules()) -> Picture:  # noqa: B008 (frozen)
    """Decodes a picture's file, whatever PIL reads, to the end.

    JPEG and PNG that mean the same to every decoder and are not too large stay as they
    are. What only some decoders would show alike is made RGB here: transparency lies
    on white, of an animation the first frame is taken, and EXIF rotation, palettes, 16
    bit, CMYK and other formats are resolved. Too large pictures keep their aspect and
    are reduced with a Lanczos filter. The file's name plays no part.

    Raises:
      BrokenPicture: when it does not decode, or `rules` leave it out.
    """
    try:
        image = Image.open(io.BytesIO(data))
        kind, side, longer = image.format, min(image.size), max(image.size)
        _check(side, longer, rules)
        reduced = bool(rules.stored_size) and side > rules.stored_size
        if reduced:
            image.draft(None, [_REDUCING_GAP * rules.stored_size] * 2)
        image.load()
        plain = (
            kind in ("JPEG", "PNG")
            and image.mode in ("L", "RGB")
            and "transparency" not in image.info
            and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
            # The header's bit depth: PIL has halved 16 bit RGB already.
            and not (kind == "PNG" and data[24] == 16)
        )
        if reduced:
            image = _reduce(_rgb(image), rules.stored_size)
            side = rules.stored_size
            data = _encode(image, kind in _LOSSY)
        elif not plain:
            data = _encode(_rgb(image), lossy=False)
    except BrokenPicture:
        raise
    except UnidentifiedImageError:
        # PIL's text names an address in memory.
        raise BrokenPicture("it is no picture of a known format") from None
    # PIL's decoders raise almost anything on damaged input.
    except Exception as error:  # noqa: BLE001
        raise BrokenPicture(f"{type(error).__name__}: {error}") from None
    return Picture(data, side, reduced or not plain)


def _check(side: int, longer: int, rules: Rules) -> None:
    if side < rules.min_side:
        raise BrokenPicture(f"its shorter side has {side} of {rules.min_side} pixels")
    if rules.max_aspect and longer > rules.max_aspect * side:
        raise BrokenPicture(
            f"{longer} by {side} pixels are more than {rules.max_aspect:g} to 1"
        )


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bit grey; convert() would clip it
        grey = np.asarray(image, np.int64).clip(0, 65_535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _reduce(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    # At least `size`: rounding must not take the shorter side below it.
    width, height = (max(size, round(side * scale)) for side in image.size)
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP
    )


def _encode(image: Image.Image, lossy: bool) -> bytes:
    file = io.BytesIO()
    if lossy:
        image.save(file, "JPEG", **_JPEG)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def encode_png(picture: np.ndarray) -> bytes:
    """`[H, W, 3]` uint8 to a PNG file."""
    return _encode(Image.fromarray(picture), lossy=False)
