"""Does a picture show what its caption asks for? Answers from the pixels alone.

For pictures of `scenes`: drawn, or sampled from a model that was trained on them.
"""

import dataclasses
import itertools

import numpy as np
from scipy import ndimage

from imagen_jax.shapes import scenes

# A pixel belongs to an object when this much of it is covered: things 1.3 pixels apart
# stay apart, and strokes of 1.2 pixels do not break.
_COVERED = 0.4
# Smaller parts of the picture are strays; the smallest drawn object has 4 %.
_STRAY = 0.01
# Windows are averaged down to about this side before shapes are compared.
_WINDOW = 32

_NAMES = tuple(scenes.COLOURS)
_WHITE = np.float32(scenes.BACKGROUND)
# From the background to each colour, [8, 3].
_RAYS = np.float32(list(scenes.COLOURS.values())) - _WHITE
# A triangle's centre of mass lies below the middle of its box.
_CENTROID_Y = {"triangle": 3**0.5 / 6}
# A pixel and its eight neighbours.
_SQUARE = np.ones((3, 3))


@dataclasses.dataclass(frozen=True)
class Object:
    """One object seen; lengths as in `scenes.Item`."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which of the caption's demands a picture meets; see `judge`."""

    colour: bool
    shape: bool
    count: bool
    size: bool | None  # None where the caption asks for none
    relation: bool | None


def judge(picture: np.ndarray, caption: str) -> Verdict:
    """Compares the objects in a picture with the things in a caption.

    Things and objects are paired one to one so that the most pairs agree in colour
    and shape, then the most in colour, in shape, in size, then the relation.

    - `count`: there are as many objects as things;
    - `colour`, `shape`: pairs agree, all that are asked are seen, and no others;
    - `size`: a thing whose size is asked has a partner whose radius is on that side of
      `scenes.SIZE_BORDER`;
    - `relation`: from one partner to the other it is further in the asked direction
      than across it.

    What a caption does not ask is None. Size and relation are not met by a partner of
    another colour and another shape. Touching objects of one colour count as one.

    Args:
      picture: `[H, W, 3]` uint8, H == W.
      caption: in the grammar of `scenes.parse`; `UserError` for any other.
    """
    wanted = scenes.parse(caption)
    seen = look(picture)
    pairs = _pair(wanted, seen)
    colours = {colour for _, colour, _ in wanted.things}
    forms = {shape for _, _, shape in wanted.things}
    sizes = [_size_fits(*pair) for pair in pairs if pair[0][0]]
    return Verdict(
        colour=colours == {o.colour for o in seen}
        and all(thing[1] == o.colour for thing, o in pairs if o),
        shape=forms == {o.shape for o in seen}
        and all(thing[2] == o.shape for thing, o in pairs if o),
        count=len(seen) == len(wanted.things),
        size=all(sizes) if sizes else None,
        relation=_relation_holds(wanted.relation, pairs),
    )


def _pair(wanted: scenes.Request, seen: list[Object]):
    """Each thing with its object, or with None where there are too few."""
    things = wanted.things
    pool = sorted(seen, key=lambda o: -o.radius)[:6] + [None] * len(things)

    def score(pairs):
        real = [(thing, o) for thing, o in pairs if o]
        colours = [thing[1] == o.colour for thing, o in real]
        forms = [thing[2] == o.shape for thing, o in real]
        both = [c and f for c, f in zip(colours, forms, strict=True)]
        sizes = [bool(_size_fits(thing, o)) for thing, o in real]
        counts = [sum(both), sum(colours), sum(forms), len(real), sum(sizes)]
        return *counts, bool(_relation_holds(wanted.relation, pairs))

    choices = itertools.permutations(pool, len(things))
    return max((list(zip(things, c, strict=True)) for c in choices), key=score)


def _is_alike(thing, found: Object | None) -> bool:
    """Whether an object can be taken for a thing at all."""
    return bool(found) and (found.colour == thing[1] or found.shape == thing[2])


def _size_fits(thing, found: Object | None) -> bool | None:
    if not thing[0]:
        return None
    is_small = thing[0] == "small"
    return _is_alike(thing, found) and (found.radius < scenes.SIZE_BORDER) == is_small


def _relation_holds(relation: str, pairs) -> bool | None:
    if not relation:
        return None
    if not all(_is_alike(*pair) for pair in pairs):
        return False
    first, second = (found for _, found in pairs)
    if relation in ("below", "right of"):
        first, second = second, first
    along, across = second.y - first.y, second.x - first.x
    if relation in ("left of", "right of"):
        along, across = across, along
    return along > abs(across)


def look(picture: np.ndarray) -> list[Object]:
    """The objects in a picture `[H, W, 3]` uint8, strays left out."""
    side = picture.shape[0]
    offset = picture.astype(np.float32) - _WHITE
    covered = np.clip(offset @ _RAYS.T / (_RAYS**2).sum(-1), 0, 1)
    labels = _labels(offset, covered)
    objects = []
    for region in _regions(labels):
        rows, columns = np.nonzero(region)
        label = labels[rows[0], columns[0]]
        alpha = covered[..., label]
        if alpha[region].sum() < _STRAY * side**2:
            continue
        # The half covered edge belongs to the object too.
        own = (labels == label) | (labels < 0)
        own &= ndimage.binary_dilation(region, _SQUARE)
        shape, x, y, radius = fit_shape(np.where(own, alpha, 0))
        colour = _colour(offset[region], alpha[region])
        objects.append(Object(shape, colour, x / side, y / side, radius / side))
    return objects


def _labels(offset: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Number of each pixel's colour, -1 for background, `[H, W]`.

    Each pixel is the nearest mix of background and one colour. Covered pixels vote in
    squares of 3 x 3: the orange line where red touches yellow has no majority.
    """
    rest = offset[..., None, :] - covered[..., None] * _RAYS
    nearest = (rest**2).sum(-1).argmin(-1)
    votes = np.where(nearest[..., None] == np.arange(len(_NAMES)), covered, 0)
    votes = ndimage.convolve(votes, _SQUARE[..., None], mode="constant")
    labels = votes.argmax(-1)
    own = np.take_along_axis(covered, labels[..., None], -1)[..., 0]
    return np.where(own >= _COVERED, labels, -1)


def _regions(labels: np.ndarray) -> list[np.ndarray]:
    """Masks `[H, W]` of 8-connected regions of equal label, by their first pixels."""
    regions = []
    for label in np.unique(labels[labels >= 0]):
        numbers, count = ndimage.label(labels == label, _SQUARE)
        regions += [numbers == i + 1 for i in range(count)]
    return sorted(regions, key=np.argmax)


def _colour(offset: np.ndarray, covered: np.ndarray) -> str:
    """Nearest colour to the median of the most covered half of an object's pixels."""
    core = np.median(offset[covered >= np.median(covered)], axis=0)
    # Even those may be 0.4 background, in a stroke as thin as a pixel.
    share = np.clip(_RAYS @ core / (_RAYS**2).sum(-1), 0.6, 1)
    rest = core - share[:, None] * _RAYS
    return _NAMES[int((rest**2).sum(-1).argmin())]


def fit_shape(alpha: np.ndarray) -> tuple[str, float, float, float]:
    """The shape that overlaps a soft mask `[H, W]` best: sum of min over sum of max.

    Shapes are tried about the mask's area and centroid, sharp and blurred.

    Returns:
      shape; x, y and radius in pixels.
    """
    rows, columns = np.nonzero(alpha)
    top, left = max(rows.min() - 1, 0), max(columns.min() - 1, 0)
    alpha = alpha[top : rows.max() + 2, left : columns.max() + 2]
    factor = -(-max(alpha.shape) // _WINDOW)
    alpha = np.pad(alpha, [(0, -n % factor) for n in alpha.shape])
    height, width = (n // factor for n in alpha.shape)
    alpha = alpha.reshape(height, factor, width, factor).mean((1, 3))

    area = alpha.sum()
    at_y, at_x = np.arange(height) + 0.5, np.arange(width) + 0.5
    mean_y, mean_x = alpha.sum(1) @ at_y / area, alpha.sum(0) @ at_x / area
    scales, steps = np.meshgrid([0.9, 0.95, 1.0, 1.05, 1.1], [-0.08, 0.0, 0.08])
    scales, steps = scales.reshape(-1, 1, 1), steps.reshape(-1, 1, 1)
    fits = []
    for shape in scenes.SHAPES:
        radius = np.sqrt(area / scenes.AREAS[shape]) * scales
        y = mean_y - (_CENTROID_Y.get(shape, 0.0) + steps) * radius
        template = scenes.coverage(shape, at_x - mean_x, at_y[:, None] - y, radius)
        sharp, blurred = _overlap(template, alpha), _overlap(_blur(template), alpha)
        overlap = np.maximum(sharp, blurred)
        k = int(overlap.argmax())
        fits.append((shape, y[k, 0, 0], radius[k, 0, 0], overlap[k]))
    shape, y, radius, _ = max(fits, key=lambda fit: fit[-1])
    place = mean_x * factor + left, y * factor + top
    return shape, *map(float, place), float(radius * factor)


def _overlap(templates: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    common = np.minimum(templates, alpha).sum((1, 2))
    return common / np.maximum(templates, alpha).sum((1, 2))


def _blur(templates: np.ndarray) -> np.ndarray:
    """Loses 0.15 to each neighbour, as small sampled pictures tend to."""
    for axis in (1, 2):
        templates = ndimage.convolve1d(
            templates, [0.15, 0.7, 0.15], axis, mode="constant"
        )
    return templates
