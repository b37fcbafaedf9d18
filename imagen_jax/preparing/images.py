"""One image's file: does it decode, is it large enough, and what is stored of it."""

import contextlib
import dataclasses
import io
import threading
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from imagen_jax.data import start_tensorflow
from imagen_jax.images import Unusable, opened

# The largest of common cameras take 102 million, of common telephones 108 million.
MAX_PIXELS = 128_000_000
# A reduced image of these formats is stored as JPEG: a PNG would be ten times as long
# and keep the losses of the first compression.
_LOSSY = ("JPEG", "MPO", "WEBP")
# A JPEG is decoded at a half, quarter or eighth if that leaves the filter at least
# this many times the stored size to work on.
_REDUCING_GAP = 3
# Threads decode at once what fits into 1 GiB.
_UNIT, _UNITS = 2**24, 64
_FREE, _TURN = threading.Semaphore(_UNITS), threading.Lock()


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image that is known to decode, as it is stored."""

    data: bytes  # a JPEG or PNG file
    side: int  # pixels of the shorter side
    reencoded: bool  # whether `data` was encoded here, or is the original file


def give_memory_back() -> None:
    """Has Pillow allocate pictures in pieces that return to the system once freed.

    malloc keeps pieces of its default, 16 MiB, for every thread that has ever decoded
    something large, and gives back those above 32 MiB. Pillow keeps eight, as new ones
    cost a third of the time of a picture of 12 megapixels.
    """
    Image.core.set_block_size(2**26)
    Image.core.set_blocks_max(8)


@contextlib.contextmanager
def _memory(size: int) -> Iterator[None]:
    """Waits until so many bytes are free; a picture that needs more has all, alone."""
    units = min(_UNITS, -(-size // _UNIT))
    with _TURN:
        for _ in range(units):
            _FREE.acquire()
    try:
        yield
    finally:
        _FREE.release(units)


def verify(
    data: bytes,
    min_side: int = 1,
    max_aspect: float = 0,
    stored_size: int = 0,
    max_pixels: int = MAX_PIXELS,
    sides: Callable[[bytes], tuple[int, int] | None] | None = None,
) -> StoredImage:
    """Decodes an image's file of any format that `images.opened` reads, to its end.

    JPEG and PNG files that every decoder shows alike and that are not too large stay
    as they are. All others become RGB, and their shorter side `stored_size` at most.
    So do those whose `sides`, width and height as training decodes a file (None if it
    cannot), are not Pillow's.

    Raises:
      Unusable: when it does not decode, or `min_side`, `max_aspect` or `max_pixels`
        leave it out.
    """
    for encode in (False, True):
        with opened(data) as image:
            side, longer = sorted(image.size)
            shape = f"{longer} by {side} pixels"
            if side < min_side:
                raise Unusable(f"its shorter side has {side} of {min_side} pixels")
            if max_aspect and longer > max_aspect * side:
                raise Unusable(f"{shape} are more than {max_aspect:g} to 1")
            if longer * side > max_pixels:
                raise Unusable(f"{shape} are more than --max_pixels={max_pixels}")
            size = stored_size if stored_size < side else 0
            if size:
                image.draft(None, [_REDUCING_GAP * size] * 2)
            with _memory(_bytes_taken(image, side * longer)):
                stored, shown = _store(image, data, size, encode)
                image.close()
                if sides is None or sides(stored.data) == shown:
                    return stored
    raise Unusable("training cannot decode it")


def _bytes_taken(image: Image.Image, pixels: int) -> int:
    """What decoding a file of so many pixels takes, and then encoding it; rounded up.

    As measured: most for WebP with transparency, whose decoder holds two canvases.
    """
    plain = image.mode in ("L", "RGB") and "transparency" not in image.info
    jpeg = image.format in ("JPEG", "MPO")
    each = 8 if plain and (jpeg or image.format == "PNG") else 25
    # libjpeg holds all coefficients of a file with several scans, at any scale.
    return each * image.width * image.height + 6 * pixels * jpeg


def _store(
    image: Image.Image, data: bytes, size: int, encode: bool
) -> tuple[StoredImage, tuple[int, int]]:
    """What is stored of the image in the file `data`, and its width and height."""
    image.load()
    kind = image.format
    plain = (
        not encode
        and kind in ("JPEG", "PNG")
        and image.mode in ("L", "RGB")
        and "transparency" not in image.info
        and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        # The bit depth in the header: PIL has halved 16 bit RGB already.
        and not (kind == "PNG" and data[24] == 16)
    )
    if size:
        image = _reduce(_rgb(image), size)
        data = _encode(image, lossy=kind in _LOSSY)
    elif not plain:
        image = _rgb(image)
        data = _encode(image, lossy=False)
    return StoredImage(data, min(image.size), bool(size) or not plain), image.size


def _rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bit grey; convert() would clip it
        grey = np.asarray(image, np.int32).clip(0, 65_535) // 257
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


def middle_square(data: bytes, size: int) -> np.ndarray:
    """The middle square of a stored file, as training cuts it: uint8 `[S, S, 3]`."""
    with opened(data) as image:
        # Decoders agree about PNG only. Drawn scenes need no TensorFlow.
        if image.format == "PNG" and image.size == (size, size):
            return np.asarray(image.convert("RGB"))
    start_tensorflow()
    from imagen_jax.data import preprocess

    return preprocess.picture(data, size).numpy()


def stored_square(picture: bytes | Image.Image, size: int) -> np.ndarray:
    """`middle_square` of what `prepare --image_size=SIZE` would store of a file.

    A Pillow image is taken as a PNG file of it. Raises `Unusable` when `prepare` would
    not take it.
    """
    if isinstance(picture, Image.Image):
        picture = _encode(_rgb(picture.copy()), lossy=False)

    def sides(data: bytes) -> tuple[int, int] | None:
        """As `middle_square` decodes it, by TensorFlow if need be."""
        with opened(data) as image:
            if image.format == "PNG" and image.size == (size, size):
                return image.size
        start_tensorflow()
        from imagen_jax.data import preprocess

        return preprocess.sides(data)

    return middle_square(verify(picture, min_side=size, sides=sides).data, size)
