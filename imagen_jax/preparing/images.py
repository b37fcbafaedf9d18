"""One image's file: does it decode, is it large enough, and what is stored of it."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_EXIF_ORIENTATION = 0x0112
# A reduced image of these formats is stored as JPEG: a PNG would be ten times as long
# and keep the losses of the first compression.
_LOSSY = ("JPEG", "MPO", "WEBP")
# A JPEG is decoded at a half, quarter or eighth if that leaves the filter at least
# this many times the stored size to work on.
_REDUCING_GAP = 3


class Unusable(Exception):
    """An image or a caption that cannot be used; the text says why."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which images are kept, and at what size."""

    min_side: int = 1  # least pixels of the shorter side
    max_aspect: float = 0  # longer side over shorter at most; 0 is no limit
    stored_size: int = 0  # the shorter side is reduced to it, never enlarged; 0: as is


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image that is known to decode, as it is stored."""

    data: bytes  # a JPEG or PNG file
    side: int  # pixels of the shorter side
    reencoded: bool  # whether `data` was encoded here, or is the original file


def verify(data: bytes, rules: Rules) -> StoredImage:
    """Decodes an image's file of any format that PIL reads, to its end.

    JPEG and PNG files that every decoder shows alike and that are not too large stay
    as they are. All others become RGB: transparency is laid on white, the first frame
    of an animation is taken, and EXIF rotation, palettes, 16 bit, CMYK and other
    formats are resolved. Images that are too large keep their aspect and are reduced
    with a Lanczos filter. The file's name plays no part.

    Raises:
      Unusable: when it does not decode, or `rules` leave it out.
    """
    try:
        image = Image.open(io.BytesIO(data))
        kind, (side, longer) = image.format, sorted(image.size)
        if side < rules.min_side:
            raise Unusable(f"its shorter side has {side} of {rules.min_side} pixels")
        if rules.max_aspect and longer > rules.max_aspect * side:
            limit = f"{rules.max_aspect:g} to 1"
            raise Unusable(f"{longer} by {side} pixels are more than {limit}")
        reduced = 0 < rules.stored_size < side
        if reduced:
            image.draft(None, [_REDUCING_GAP * rules.stored_size] * 2)
        image.load()
        plain = (
            kind in ("JPEG", "PNG")
            and image.mode in ("L", "RGB")
            and "transparency" not in image.info
            and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
            # The bit depth in the header: PIL has halved 16 bit RGB already.
            and not (kind == "PNG" and data[24] == 16)
        )
        if reduced:
            side = rules.stored_size
            data = _encode(_reduce(_rgb(image), side), kind in _LOSSY)
        elif not plain:
            data = _encode(_rgb(image), lossy=False)
    except Unusable:
        raise
    except UnidentifiedImageError:
        # PIL's text names an address in memory.
        raise Unusable("it is no picture of a known format") from None
    # PIL's decoders raise almost anything on damaged input.
    except Exception as error:  # noqa: BLE001
        raise Unusable(f"{type(error).__name__}: {error}") from None
    return StoredImage(data, side, reduced or not plain)


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
        image.save(file, "JPEG", quality=95, subsampling=0)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """`[H, W, 3]` uint8 to a PNG file."""
    return _encode(Image.fromarray(pixels), lossy=False)
