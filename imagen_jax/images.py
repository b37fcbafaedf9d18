"""Pictures: files opened, grids with captions, PNG files written."""

import bisect
import contextlib
import functools
import io
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from imagen_jax.errors import UserError

# Pillow reads dozens of others, and some by starting a program: EPS by Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
# White pixels around each image of a grid.
_GAP = 4
_OPENING = threading.Lock()
# Where Pillow's own font, which has little more than ASCII, lacks a letter: those that
# common systems have, in their usual folders.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "arial.ttf",
)
_NO_LETTER = "\U0010ffff"
# A longer label is cut: it would bury the pictures.
_LABEL_LETTERS = 300


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


def read(path, most_side: int = 0) -> np.ndarray:
    """The picture in a file, `[H, W, 3]` uint8, reduced to at most `most_side`.

    Raises:
      UserError: when there is none, or it is damaged.
    """
    try:
        with opened(epath.Path(path).read_bytes()) as image:
            times = -(-max(image.size) // most_side) if most_side else 1
            return np.asarray(image.convert("RGB").reduce(times))
    except (OSError, Unusable) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error}): remove it, to have it made again"
        ) from None


def grid(
    images: np.ndarray,
    columns: int,
    captions: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
) -> np.ndarray:
    """Images `[N, H, W, 3]` uint8 in rows on white, `[H', W', 3]` uint8.

    `captions` are one under each image, wrapped to its width, or none at all; `rows`
    are names, each at the left of its row; the title stands above all.
    """
    count, height, width, _ = images.shape
    labels = [_label(text, width) for text in captions]
    # The name of a row is on one line.
    names = [_label(text, 2**15) for text in rows]
    left = _GAP + max((int(f.getlength(t)) + 5 for t, f in names), default=0)
    sheet_w = left + columns * (width + _GAP)
    head = _label(title, sheet_w - 2 * _GAP)
    # Where each row begins, and the end of the last.
    under = [_height(labels[i : i + columns]) for i in range(0, count, columns)]
    top = _GAP + (_height([head]) if title else 0)
    tops = np.cumsum([top, *(height + _GAP + more for more in under)])
    size = sheet_w, int(tops[-1])
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2), head[0], "black", head[1], spacing=1)
    for i, image in enumerate(images):
        x, y = left + i % columns * (width + _GAP), int(tops[i // columns])
        sheet.paste(Image.fromarray(image), (x, y))
        if labels:
            text, font = labels[i]
            draw.text((x, y + height), text, "black", font, spacing=1)
    for (text, font), y in zip(names, tops):
        draw.text((_GAP, int(y) + height // 2), text, "black", font, "lm")
    return np.asarray(sheet)


def _height(labels: Sequence[tuple[str, Any]]) -> int:
    lines = max((text.count("\n") + 1 for text, _ in labels if text), default=0)
    return 13 * lines + 2 if lines else 0


@functools.cache
def _fonts() -> list[Any]:
    fonts = [ImageFont.load_default(size=11)]
    for name in _FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, 11))
    return fonts


@functools.lru_cache(2**16)
def _lacks(font, letter: str) -> bool:
    """Whether a font draws a letter as one that no font has."""
    letter, none = font.getmask(letter), font.getmask(_NO_LETTER)
    return (letter.size, bytes(letter)) == (none.size, bytes(none))


def _label(text: str, width: int) -> tuple[str, Any]:
    """A text in lines of at most `width` pixels, and the font that has most of it.

    What that one lacks is escaped.
    """
    words = text[:_LABEL_LETTERS].split()
    if len(text) > _LABEL_LETTERS:
        words.append("...")
    letters = set("".join(words))
    lacks = [{c for c in letters if _lacks(font, c)} for font in _fonts()]
    fewest = min(lacks, key=len)
    font = _fonts()[lacks.index(fewest)]
    escapes = {ord(c): c.encode("unicode_escape").decode() for c in fewest}
    text = " ".join(words).translate(escapes)

    def is_too_wide(count: int) -> bool:
        return max(map(font.getlength, textwrap.wrap(text, count))) > width

    # The most letters in a line with which all of them fit.
    count = bisect.bisect_left(range(1, len(text) + 1), True, key=is_too_wide)
    return "\n".join(textwrap.wrap(text, max(count, 1))), font


def png(
    image: np.ndarray | Image.Image, about: Mapping[str, str] | None = None
) -> bytes:
    """`[H, W, 3]` uint8 or a Pillow image as a PNG file.

    The texts of `about` are stored in it, by default those of the image's `info`.
    """
    file, stored = io.BytesIO(), PngInfo()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    for name, text in (image.info if about is None else about).items():
        if isinstance(text, str):
            stored.add_text(name, text)
    image.save(file, "PNG", pnginfo=stored)
    return file.getvalue()


def save(path, image, about: Mapping[str, str] | None = None) -> None:
    """Writes what `png` makes to `path`, local or gs://."""
    epath.Path(path).write_bytes(png(image, about))


def save_sheet(
    path, images: np.ndarray, columns: int, captions: Sequence[str], title: str = ""
) -> None:
    """Saves a captioned grid of square images, small ones enlarged to about 96."""
    side = images.shape[1]
    images = enlarge(images, side * max(1, 96 // side))
    save(path, grid(images, columns, captions, title=title))
