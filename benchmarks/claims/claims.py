"""The paper's claims (arXiv 2205.11487, Sec. 4.4, App. B and D) as data.

Of each: which stages are trained on what, how they are sampled, what is measured, and
what must hold for it to be confirmed. All of it was written before any of the runs that
it decides about.
"""

import dataclasses
from typing import Any

from benchmarks.claims.intervals import Criterion
from benchmarks.claims.worlds import (
    COLOURS,
    EMOJI,
    ENLARGED,
    RELATIONS,
    SHAPES,
    UNASKED,
    WORDINGS,
    World,
)

TINY_BASE, TINY_SR = "configs/tiny.py:base", "configs/tiny.py:sr"
# The paper's loss, and all channels of the embeddings.
_PLAIN = {"diffusion.weighting": "plain", "model.text_features": 0}


@dataclasses.dataclass(frozen=True)
class Training:
    """A stage, trained once for each seed."""

    name: str  # of its workdirs
    world: World
    encoder: str  # "tiny", or one of `encoders.KINDS`
    config: str
    steps: int
    step_seconds: float  # on two quiet cores, about
    changes: tuple[tuple[str, Any], ...] = ()  # values of the config


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the ways that are compared: stages, base first, and their sampling."""

    label: str
    stages: tuple[Training, ...]
    flags: tuple[str, ...] = ()  # of `sample`
    minutes: float = 0.7  # of sampling, about
    world: World | None = None  # that asks, if it is not the last stage's

    @property
    def asks(self) -> World:
        """The world that says what is asked."""
        return self.world or self.stages[-1].world


@dataclasses.dataclass(frozen=True)
class Plot:
    """Lines of figures: the `(x, arm, kind)` of each; x is a number or a name."""

    measure: str
    x: str  # what x is
    lines: tuple[tuple[str, tuple[tuple[Any, str, str], ...]], ...]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper says, and how it is looked at here."""

    name: str
    says: str  # the paper, in short, and where
    arms: tuple[Arm, ...]
    columns: tuple[tuple[str, str], ...]  # (measure, kind) of the table
    criteria: tuple[Criterion, ...]
    plots: tuple[Plot, ...]
    # Whether the loss of the last stages is drawn, against time and arithmetic.
    curves: bool = False

    @property
    def trainings(self) -> tuple[Training, ...]:
        """Each once, in the order in which they are needed."""
        return tuple(dict.fromkeys(one for arm in self.arms for one in arm.stages))


def _base(world: World, encoder: str, steps: int, unet: str = "", **more) -> Training:
    name = "-".join(filter(None, (world.name, encoder, unet)))
    seconds = {"half": 0.07, "twice": 0.22}.get(unet, 0.12)
    # 1.3M, 3.1M and 5.6M parameters, with text of width 384.
    widths = {"half": "(32, 64)", "twice": "(96, 128)"}
    changes = (("model.channels", widths[unet]),) if unet in widths else ()
    return Training(
        name, world, encoder, TINY_BASE, steps, seconds, changes + tuple(more.items())
    )


def _mean_of(*labels: str, sign: float = 1.0) -> tuple[tuple[str, float], ...]:
    return tuple((label, sign / len(labels)) for label in labels)


def _difference(more: str, less: str) -> tuple[tuple[str, float], ...]:
    return ((more, 1.0), (less, -1.0))


# 1. The text encoder.

_LAYERS = {"layers1": 1, "layers2": 2, "layers3": 3, "pretrained": 6}
_ENCODERS = ("tiny", "random", *_LAYERS)
_WORDINGS_STEPS, _COLOURS_STEPS = 2900, 2000
_ENCODER_KINDS = {
    "wordings": ("share", ("trained", "wordings", "words")),
    "colours": ("distance", ("trained", "names", "words")),
}


def _wordings(encoder: str) -> Arm:
    training = _base(WORDINGS, encoder, _WORDINGS_STEPS)
    return Arm(f"wordings: {encoder}", (training,), ("--guidance=3",))


def _colours(encoder: str) -> Arm:
    training = _base(COLOURS, encoder, _COLOURS_STEPS, **_PLAIN)
    return Arm(f"colours: {encoder}", (training,), ("--guidance=2",), minutes=1.0)


TEXT_ENCODER = Claim(
    "text_encoder",
    "Frozen encoders that were trained on text alone are very effective, and the "
    "larger the better (Sec. 4.4, Fig. 4a).",
    tuple(make(name) for make in (_colours, _wordings) for name in _ENCODERS),
    (("share", "trained"), ("share", "wordings"), ("share", "words"))
    + (("right", "trained"), ("right", "wordings"), ("right", "words"))
    + (("distance", "trained"), ("distance", "names"), ("distance", "words"))
    + (("near", "names"), ("near", "words")),
    (
        Criterion(
            "of what is asked in words never trained on, pretrained gets 10 points "
            "more right than the same network with random weights",
            *("share", "words"),
            _difference("wordings: pretrained", "wordings: random"),
            above=0.10,
        ),
        Criterion(
            "and than the drawn encoder",
            *("share", "words"),
            _difference("wordings: pretrained", "wordings: tiny"),
            above=0.10,
        ),
        Criterion(
            "in new wordings of trained words it gets more right than random",
            *("share", "wordings"),
            _difference("wordings: pretrained", "wordings: random"),
        ),
        Criterion(
            "in trained wordings the two are equal, to within 10 points",
            *("share", "trained"),
            _difference("wordings: pretrained", "wordings: random"),
            within=0.10,
        ),
        Criterion(
            "colours by words never trained on are painted nearer by 5 in CIELAB",
            *("distance", "words"),
            _difference("colours: random", "colours: pretrained"),
            above=5.0,
        ),
        Criterion(
            "colours by new names of trained words are painted nearer",
            *("distance", "names"),
            _difference("colours: random", "colours: pretrained"),
        ),
        Criterion(
            "six layers get more right than one, in words never trained on",
            *("share", "words"),
            _difference("wordings: pretrained", "wordings: layers1"),
        ),
        Criterion(
            "and paint colours by words never trained on nearer",
            *("distance", "words"),
            _difference("colours: layers1", "colours: pretrained"),
        ),
    ),
    tuple(
        Plot(
            measure,
            f"captions of {world}",
            tuple(
                (name, tuple((kind, f"{world}: {name}", kind) for kind in kinds))
                for name in _ENCODERS
            ),
        )
        for world, (measure, kinds) in _ENCODER_KINDS.items()
    )
    + tuple(
        Plot(
            measure,
            f"layers of the encoder, {world}",
            tuple(
                (kind, tuple((n, f"{world}: {e}", kind) for e, n in _LAYERS.items()))
                for kind in kinds
            ),
        )
        for world, (measure, kinds) in _ENCODER_KINDS.items()
    ),
)

# 2. Its size, and that of the U-Net.

_SIZED = {"layers1": "1 layer", "layers3": "3 layers", "pretrained": "6 layers"}
_UNETS = {"half": 1.3, "": 3.1, "twice": 5.6}  # million parameters


def _sized(encoder: str, unet: str) -> Arm:
    label = f"{_SIZED[encoder]}, {_UNETS[unet]}M"
    training = _base(COLOURS, encoder, _COLOURS_STEPS, unet, **_PLAIN)
    return Arm(label, (training,), ("--guidance=2",), minutes=1.0)


ENCODER_SIZE = Claim(
    "encoder_size",
    "Scaling the text encoder matters more than scaling the U-Net (Sec. 4.4, Fig. 4b).",
    tuple(_sized(encoder, unet) for encoder in _SIZED for unet in _UNETS),
    tuple(("distance", kind) for kind in ("", "trained", "names", "words")),
    (
        Criterion(
            "six layers for one bring colours nearer, over all kinds of captions, than "
            "5.6M parameters for 1.3M",
            *("distance", ""),
            (("1 layer, 3.1M", 1.0), ("6 layers, 3.1M", -1.0))
            + (("3 layers, 1.3M", -1.0), ("3 layers, 5.6M", 1.0)),
        ),
        Criterion(
            "they do bring them nearer",
            *("distance", ""),
            _mean_of(*(f"1 layer, {m}M" for m in _UNETS.values()))
            + _mean_of(*(f"6 layers, {m}M" for m in _UNETS.values()), sign=-1.0),
        ),
    ),
    (
        Plot(
            "distance",
            "million parameters of the U-Net",
            tuple(
                (f"{layers}, {kind or 'all'}", points)
                for kind in ("", "words")
                for layers in _SIZED.values()
                for points in [
                    tuple((m, f"{layers}, {m}M", kind) for m in _UNETS.values())
                ]
            ),
        ),
    ),
)

# 3. How the text reaches the U-Net.

_CONDITIONINGS = ("concatenate", "cross", "attention_pool", "mean_pool")


def _conditioned(kind: str) -> Arm:
    training = Training(
        f"relations-{kind}",
        *(RELATIONS, "tiny", TINY_BASE, 3600, 0.12),
        (("model.text_conditioning", kind), *_PLAIN.items()),
    )
    return Arm(kind, (training,), ("--guidance=3",), minutes=0.4)


CONDITIONING = Claim(
    "text_conditioning",
    "Attention over the sequence of text embeddings is better than pooling them "
    "(Sec. 4.4, Fig. A.13a).",
    tuple(_conditioned(kind) for kind in _CONDITIONINGS),
    tuple((name, "") for name in ("all", "right", "colour", "shape", "relation")),
    tuple(
        Criterion(
            f"two objects in a relation: {attends} is 5 points above {pooled}",
            *("all", ""),
            _difference(attends, pooled),
            above=0.05,
        )
        for attends in _CONDITIONINGS[:2]
        for pooled in _CONDITIONINGS[2:]
    ),
    (
        Plot(
            "all",
            "how the text is used",
            (("", tuple((kind, kind, "") for kind in _CONDITIONINGS)),),
        ),
    ),
)

# 4. Noise-conditioning augmentation.

_LEVELS = (0.0, 0.1, 0.2, 0.3)
_GOOD = _base(SHAPES, "tiny", 2900)
_FLAWED = dataclasses.replace(_GOOD, name="shapes-tiny-short", steps=700)
_WITH = Training("shapes-sr", SHAPES, "tiny", TINY_SR, 1500, 0.10)
_WITHOUT = dataclasses.replace(
    _WITH,
    name="shapes-sr-clean",
    changes=(("diffusion.lowres_augmentation", False), ("sampler.aug_level", 0.0)),
)


def _enlarged(base: str, level: float | None) -> Arm:
    first = _GOOD if base == "good" else _FLAWED
    flags = "--guidance=3", "--guidance=1"
    if level is None:
        return Arm(f"{base} base, without", (first, _WITHOUT), flags, minutes=0.5)
    label = f"{base} base, level {level:g}"
    return Arm(label, (first, _WITH), (*flags, f"--aug_level={level:g}"), minutes=0.5)


AUGMENTATION = Claim(
    "augmentation",
    "Noise-conditioning augmentation is critical: without it fidelity and alignment "
    "are worse, and levels of 0.1 to 0.3 are good (Sec. 4.4, Fig. A.11).",
    tuple(_enlarged(b, x) for b in ("flawed", "good") for x in (None, *_LEVELS)),
    tuple((name, "") for name in ("right", "colour", "shape", "count", "size")),
    (
        Criterion(
            "pictures of a flawed base are right more often with augmentation than "
            "without",
            *("right", ""),
            _difference("flawed base, level 0.1", "flawed base, without"),
        ),
        Criterion(
            "those of a good one are not right less often by 3 points",
            *("right", ""),
            _difference("good base, level 0.1", "good base, without"),
            above=-0.03,
        ),
    ),
    (
        Plot(
            "right",
            "level at sampling",
            tuple(
                (f"{base} base, {how}", points)
                for base in ("flawed", "good")
                for how, points in (
                    ("with", [(x, f"{base} base, level {x:g}", "") for x in _LEVELS]),
                    ("without", [(x, f"{base} base, without", "") for x in _LEVELS]),
                )
                for points in [tuple(points)]
            ),
        ),
    ),
)

# 5. The Efficient U-Net.

# 1.6M parameters each.
_EFFICIENT = Training(
    "shapes-efficient",
    *(SHAPES, "tiny", TINY_SR, 1500, 0.18),
    (("model.num_res_blocks", "(2, 4)"),),
)
_UNSCALED = dataclasses.replace(
    _EFFICIENT,
    name="shapes-efficient-unscaled",
    changes=(*_EFFICIENT.changes, ("model.skip_scale", 1.0)),
)
_UNET = dataclasses.replace(
    _EFFICIENT,
    name="shapes-unet",
    step_seconds=0.55,
    changes=(
        ("model.architecture", "unet"),
        ("model.num_res_blocks", "(2, 2)"),
        ("model.skip_scale", 1.0),
    ),
)
# Trained for as long as the Efficient U-Net, in time and in arithmetic.
_SHORT = dataclasses.replace(_UNET, name="shapes-unet-short", steps=325)
_NETWORKS = {
    "efficient": _EFFICIENT,
    "unscaled": _UNSCALED,
    "U-Net": _UNET,
    "U-Net, as long": _SHORT,
}

EFFICIENT_UNET = Claim(
    "efficient_unet",
    "The Efficient U-Net takes two to three times less time a step and converges "
    "faster; scaling skips by 1/sqrt(2) speeds that (Sec. 2.5, App. B.1, D.3.2).",
    tuple(
        Arm(name, (_GOOD, one), ("--guidance=3", "--guidance=1"))
        for name, one in _NETWORKS.items()
    ),
    tuple((name, "") for name in ("right", "loss", "step_seconds", "gflop")),
    (
        Criterion(
            "a step of a U-Net with as many parameters takes 1.5 times as long",
            *("step_seconds", ""),
            (("U-Net", 1.0), ("efficient", -1.5)),
        ),
        Criterion(
            "and twice the arithmetic",
            *("gflop", ""),
            (("U-Net", 1.0), ("efficient", -2.0)),
        ),
        Criterion(
            "pictures after equal steps are not right less often by 3 points",
            *("right", ""),
            _difference("efficient", "U-Net"),
            above=-0.03,
        ),
        Criterion(
            "with scaled skips the loss is lower",
            *("loss", ""),
            _difference("unscaled", "efficient"),
        ),
    ),
    (
        Plot(
            "right",
            "network",
            (("", tuple((name, name, "") for name in _NETWORKS)),),
        ),
    ),
    curves=True,
)

# 6. Guidance and thresholding.

_WEIGHTS = (1.0, 3.0, 8.0, 16.0)
_THRESHOLDS = ("none", "static", "dynamic")
_EMOJI_BASE = Training("emoji-base", EMOJI, "tiny", "configs/emoji.py:base", 5000, 0.21)

THRESHOLDING = Claim(
    "thresholding",
    "Dynamic thresholding keeps pictures natural at large guidance weights, where "
    "static ones saturate them and without any they fail (Sec. 2.3, Fig. A.8).",
    tuple(
        Arm(
            f"{kind}, w {w:g}",
            (_EMOJI_BASE,),
            (f"--guidance={w:g}", f"--threshold={kind}"),
            minutes=0.5,
        )
        for kind in _THRESHOLDS
        for w in _WEIGHTS
    ),
    tuple((name, "") for name in ("found", "distance", "chroma")),
    (
        Criterion(
            "at w = 16 pictures fit their captions more often than without thresholds",
            *("found", ""),
            _difference("dynamic, w 16", "none, w 16"),
        ),
        Criterion(
            "at w = 8 the chroma is nearer to the emoji's than with static ones",
            *("chroma", ""),
            _difference("static, w 8", "dynamic, w 8"),
        ),
        Criterion(
            "and the distance to all emoji is smaller",
            *("distance", ""),
            _difference("static, w 8", "dynamic, w 8"),
        ),
        Criterion(
            "and they fit their captions not less often by 3 points",
            *("found", ""),
            _difference("dynamic, w 8", "static, w 8"),
            above=-0.03,
        ),
    ),
    tuple(
        Plot(
            measure,
            "w",
            tuple(
                (kind, tuple((w, f"{kind}, w {w:g}", "") for w in _WEIGHTS))
                for kind in _THRESHOLDS
            ),
        )
        for measure in ("found", "distance", "chroma")
    ),
)

# Two questions of our own, about what the paper leaves open.

_LINEAR = dataclasses.replace(
    _WITH, name="shapes-sr-linear", changes=(("diffusion.schedule", "linear"),)
)
_GRIDS = ("time", "logsnr")

GRID = Claim(
    "grid",
    "Ours: along a linear schedule, as that of 256 to 1024 pixels, 128 steps that are "
    "even in time leave the finest scales of noise out; steps even in log-SNR do not.",
    tuple(
        Arm(
            grid,
            (_LINEAR,),
            (f"--grid={grid}", "--sampler=ddpm", "--steps=128", "--aug_level=0"),
            minutes=0.8,
            world=ENLARGED,
        )
        for grid in _GRIDS
    ),
    (("error", ""), ("detail", "")),
    (
        Criterion(
            "enlarged scenes are nearer to those drawn large",
            *("error", ""),
            _difference("time", "logsnr"),
        ),
        Criterion(
            "and have more detail",
            *("detail", ""),
            _difference("logsnr", "time"),
        ),
    ),
    tuple(
        Plot(measure, "steps even in", (("", tuple((g, g, "") for g in _GRIDS)),))
        for measure in ("error", "detail")
    ),
)

_DEEP = {
    name: Training(
        f"deep-{name}",
        *(UNASKED, "tiny", f"benchmarks/claims/deep.py:{variant}", 600, 0.25),
        changes,
    )
    for name, variant, changes in (
        ("eps5", "eps5", ()),
        ("eps6", "eps6", ()),
        ("unscaled", "eps5", (("model.skip_scale", 1.0),)),
    )
}

EPSILON = Claim(
    "epsilon",
    "Ours: in sr256's many blocks, scaled by 1/sqrt(2), an epsilon of 1e-6 in "
    "GroupNorm learns faster than 1e-5.",
    tuple(Arm(name, (one,), minutes=0.0) for name, one in _DEEP.items()),
    (("loss", ""),),
    (
        Criterion(
            "the loss is lower with the smaller epsilon",
            *("loss", ""),
            _difference("eps5", "eps6"),
        ),
    ),
    (Plot("loss", "network", (("", tuple((n, n, "") for n in _DEEP)),)),),
    curves=True,
)

CLAIMS = {
    claim.name: claim
    for claim in (
        *(TEXT_ENCODER, ENCODER_SIZE, CONDITIONING),
        *(AUGMENTATION, EFFICIENT_UNET, THRESHOLDING),
        *(GRID, EPSILON),
    )
}
