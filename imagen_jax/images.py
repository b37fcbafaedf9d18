"""Grids of captioned pictures, and PNG files."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """`[N, h, w, 3]` to `[N, size, size, 3]` by repeating pixels; `size` a multiple."""
    times = size // images.shape[1]
    return images.repeat(times, axis=1).repeat(times, axis=2)


def grid(
    images: np.ndarray, columns: int, captions: Sequence[str] = (), gap: int = 4
) -> np.ndarray:
    """Images `[N, H, W, 3]` uint8 in rows on white, `[H', W', 3]` uint8.

    `captions` are one under each image, wrapped to its width, or none at all; `gap` is
    the number of white pixels around each image.
    """
    count, height, width, _ = images.shape
    font = ImageFont.load_default(size=11)
    texts = [_wrap(text, width, font) for text in captions]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    label = 13 * lines + 2 if lines else 0
    rows = -(-count // columns)
    cell_w, cell_h = width + gap, height + label + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + i % columns * cell_w, gap + i // columns * cell_h
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


def save(path, image: np.ndarray) -> None:
    """Writes `[H, W, 3]` uint8 as the PNG `path`, local or gs://."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    epath.Path(path).write_bytes(png.getvalue())


def save_sheet(path, images: np.ndarray, columns: int, captions: Sequence[str]) -> None:
    """Saves a captioned grid of square images, small ones enlarged to about 96."""
    side = images.shape[1]
    images = enlarge(images, side * max(1, 96 // side))
    save(path, grid(images, columns, captions))
