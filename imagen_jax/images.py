"""Pictures: files opened, grids with captions, PNG files written."""

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

# Pillow reads dozens of others, and some by starting a program: EPS by Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
# White pixels around each image of a grid.
_GAP = 4
_OPENING = threading.Lock()


class Unusable(Exception):
    """A picture that cannot be used; the text says why."""


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """A picture's file of a format that docs/prepare.md names, to be decoded inside.

    Only its header is read: look at the size before `load`, as there is no limit.

    Raises:
      Unusable: for files of other formats, and for whatever Pillow raises inside.
    """
    try:
        # Pillow's limit is a global, and it warns of pictures long before it.
        with _OPENING:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(data), formats=_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        yield image
    except Unusable:
        raise
    except UnidentifiedImageError:
        # Pillow's text names an address in memory.
        raise Unusable("it is no picture of a known format") from None
    # Pillow's decoders raise almost anything on damaged input.
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {error}") from None


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """`[N, h, w, 3]` to `[N, size, size, 3]` by repeating pixels; `size` a multiple."""
    times = size // images.shape[1]
    return images.repeat(times, axis=1).repeat(times, axis=2)


def grid(images: np.ndarray, columns: int, captions: Sequence[str] = ()) -> np.ndarray:
    """Images `[N, H, W, 3]` uint8 in rows on white, `[H', W', 3]` uint8.

    `captions` are one under each image, wrapped to its width, or none at all.
    """
    count, height, width, _ = images.shape
    font = ImageFont.load_default(size=11)
    texts = [_wrap(text, width, font) for text in captions]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    label = 13 * lines + 2 if lines else 0
    rows = -(-count // columns)
    cell_w, cell_h = width + _GAP, height + label + _GAP
    sheet = Image.new("RGB", (columns * cell_w + _GAP, rows * cell_h + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = _GAP + i % columns * cell_w, _GAP + i // columns * cell_h
        sheet.paste(Image.fromarray(image), (x, y))
        if texts:
            draw.text((x, y + height), texts[i], "black", font, spacing=1)
    return np.asarray(sheet)


def _wrap(text: str, width: int, font) -> str:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return "\n".join([*lines, line])


def png(image: np.ndarray) -> bytes:
    """`[H, W, 3]` uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def save(path, image: np.ndarray) -> None:
    """Writes `[H, W, 3]` uint8 as the PNG `path`, local or gs://."""
    epath.Path(path).write_bytes(png(image))


def save_sheet(path, images: np.ndarray, columns: int, captions: Sequence[str]) -> None:
    """Saves a captioned grid of square images, small ones enlarged to about 96."""
    side = images.shape[1]
    images = enlarge(images, side * max(1, 96 // side))
    save(path, grid(images, columns, captions))
