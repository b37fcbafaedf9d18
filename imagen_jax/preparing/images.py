"""One image's file: does it decode, is it large enough, and what is stored of it."""

import dataclasses
import io

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# A reduced image of these formats is stored as JPEG: a PNG would be ten times as long
# and keep the losses of the first compression.
_LOSSY = ("JPEG", "MPO", "WEBP")
# A JPEG is decoded at a half, quarter or eighth if that leaves the filter at least
# this many times the stored size to work on.
_REDUCING_GAP = 3


class Unusable(Exception):
    """An image that cannot be used; the text says why."""


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image that is known to decode, as it is stored."""

    data: bytes  # a JPEG or PNG file
    side: int  # pixels of the shorter side
    reencoded: bool  # whether `data` was encoded here, or is the original file


def verify(
    data: bytes, min_side: int = 1, max_aspect: float = 0, stored_size: int = 0
) -> StoredImage:
    """Decodes an image's file of any format that PIL reads, to its end.

    JPEG and PNG files that every decoder shows alike and that are not too large stay
    as they are. All others become RGB, and their shorter side `stored_size` at most.

    Raises:
      Unusable: when it does not decode, or `min_side` or `max_aspect` leave it out.
    """
    try:
        image = Image.open(io.BytesIO(data))
        kind, (side, longer) = image.format, sorted(image.size)
        if side < min_side:
            raise Unusable(f"its shorter side has {side} of {min_side} pixels")
        if max_aspect and longer > max_aspect * side:
            shape = f"{longer} by {side} pixels"
            raise Unusable(f"{shape} are more than {max_aspect:g} to 1")
        reduced = 0 < stored_size < side
        if reduced:
            image.draft(None, [_REDUCING_GAP * stored_size] * 2)
        image.load()
        plain = (
            kind in ("JPEG", "PNG")
            and image.mode in ("L", "RGB")
            and "transparency" not in image.info
            and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            # The bit depth in the header: PIL has halved 16 bit RGB already.
            and not (kind == "PNG" and data[24] == 16)
        )
        if reduced:
            side = stored_size
            data = _encode(_reduce(_rgb(image), side), lossy=kind in _LOSSY)
        elif not plain:
            data = _encode(_rgb(image), lossy=False)
    except Unusable:
        raise
    except UnidentifiedImageError:
        # PIL's text names an address in memory.
        raise Unusable("it is no picture of a known format") from None
    # PIL's decoders raise almost anything on damaged input.
    except Exception as error:
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
    sides = [max(size, round(side * scale)) for side in image.size]
    return image.resize(sides, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)


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
