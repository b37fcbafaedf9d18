"""Grids of pictures, with captions, as PNG."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont


def enlarge(pictures: np.ndarray, size: int) -> np.ndarray:
    """`[N, h, w, 3]` to `[N, size, size, 3]` by repeating pixels; `size` a multiple."""
    times = size // pictures.shape[1]
    return pictures.repeat(times, axis=1).repeat(times, axis=2)


def grid(
    pictures: np.ndarray,
    columns: int,
    captions: Sequence[str] = (),
    gap: int = 4,
) -> np.ndarray:
    """Lays `[N, H, W, 3]` uint8 pictures out row by row on white.

    Args:
      pictures: all of one size.
      columns: pictures per row.
      captions: one under each picture, wrapped to its width; or none at all.
      gap: white pixels around each picture.

    Returns:
      `[H', W', 3]` uint8.
    """
    count, height, width, _ = pictures.shape
    font = ImageFont.load_default(size=11)
    texts = [_wrap(text, width, font) for text in captions]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    label = 13 * lines + 2 if lines else 0
    rows = -(-count // columns)
    cell_w, cell_h = width + gap, height + label + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * cell_w, gap + i // columns * cell_h
        sheet.paste(Image.fromarray(picture), (x, y))
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


def save(path, picture: np.ndarray) -> None:
    """Writes `[H, W, 3]` uint8 as the PNG `path`, local or gs://."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    epath.Path(path).write_bytes(png.getvalue())
