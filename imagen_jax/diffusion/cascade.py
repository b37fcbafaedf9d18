"""Sampling a cascade: each stage's images, quantised and noised, condition the next."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from imagen_jax.batch import Cond, to_float, to_uint8
from imagen_jax.compilation import compiler_options
from imagen_jax.config import SamplerConfig, StageConfig
from imagen_jax.diffusion.loss import augment
from imagen_jax.diffusion.sampler import guidance_weights, sample
from imagen_jax.errors import UserError
from imagen_jax.sharding import batch_sharding, on_mesh, row_shards

OnStep = Callable[[jax.Array, jax.Array], None]


@flax.struct.dataclass
class Stage:
    """A trained stage; `cfg.sampler` says how it is sampled."""

    params: Any  # placed on the mesh
    cfg: StageConfig = flax.struct.field(pytree_node=False)
    # `(cfg.model, params, z, logsnr, cond) -> [B, H, W, 3]`; always the same function
    # object, because each new one compiles again.
    apply: Callable[..., jax.Array] = flax.struct.field(pytree_node=False)


class Settings(NamedTuple):
    """Values in which the images of a batch may differ, float32."""

    guidance: np.ndarray  # [N, steps], w of the paper's Eq. 2 at each step
    aug_level: np.ndarray  # [N] in [0, 1], noise level of the low-resolution input

    @classmethod
    def of(cls, sampler: SamplerConfig, count: int) -> "Settings":
        """The settings of a stage's config, for `count` images."""
        return cls(
            guidance=np.tile(guidance_weights(sampler), (count, 1)),
            aug_level=np.full(count, sampler.aug_level, np.float32),
        )


class Inputs(NamedTuple):
    """What N images of a stage are made from."""

    seeds: np.ndarray  # [N] uint32
    text: np.ndarray  # [N, L, D]
    mask: np.ndarray  # [N, L] bool
    guidance: np.ndarray  # this and the next as in `Settings`
    aug_level: np.ndarray
    lowres: np.ndarray | None  # [N, h, w, 3] uint8; None for a base stage


# Of a service that is asked for ever new settings the oldest programs go.
@functools.lru_cache(64)
def compile_sampler(
    apply: Callable[..., jax.Array],
    cfg: StageConfig,
    mesh: Mesh,
    recorded_steps: tuple[int, ...] = (),
    on_step: OnStep | None = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """What `sample_cascade` does with a batch of a stage, as one program for the mesh.

    Returns:
      A jitted function of `params`, as in `Stage`; `seeds` `[B]` uint32; `text` and
      `mask`, `[B, L, D]` and `[B, L]`; `guidance` and `aug_level`, as in `Settings`;
      and `lowres` `[B, h, w, 3]` uint8, or None for a base stage. It returns the images
      `[B, H, W, 3]` and the estimates at K recorded steps `[B, K, H, W, 3]`, uint8.
    """

    def run(params, seeds, text, mask, guidance, aug_level, lowres):
        # Keys depend on the stage's size, not on its position in a list, so that a
        # cascade entered midway draws the same noise.
        keys = jax.vmap(
            lambda seed: jax.random.fold_in(jax.random.key(seed), cfg.image_size)
        )(seeds)
        key_sample, key_aug = jax.vmap(jax.random.split, out_axes=1)(keys)
        cond = Cond(text=text, mask=mask)
        if cfg.lowres_size:
            lowres = to_float(lowres)
            noise = jax.vmap(lambda k: jax.random.normal(k, lowres.shape[1:]))(key_aug)
            cond = augment(cond, lowres, aug_level, noise, cfg)
        x0, recorded = sample(
            functools.partial(apply, cfg.model, params),
            key_sample,
            cond,
            (cfg.image_size, cfg.image_size, 3),
            cfg.diffusion,
            cfg.sampler,
            guidance.T,
            recorded_steps,
            on_step,
        )
        return to_uint8(x0), to_uint8(recorded.swapaxes(0, 1))

    options = compiler_options(mesh, cfg.model.dtype)
    return jax.jit(on_mesh(run, mesh), compiler_options=options)


def _program(cfg: StageConfig, settings: Settings) -> StageConfig:
    """`cfg` without the values that are arguments, so that they need no new program.

    Of the guidance weights only the steps at which any image is guided are kept.
    """
    pattern = tuple(2.0 if any_ else 1.0 for any_ in (settings.guidance != 1).any(0))
    sampler = dataclasses.replace(
        cfg.sampler,
        guidance=1.0,
        guidance_schedule=pattern,
        aug_level=0.0,
        batch_size=1,
    )
    return dataclasses.replace(cfg, sampler=sampler)


def check_order(configs: Sequence[StageConfig], made: int = 0) -> None:
    """Raises `UserError` unless each stage takes what the one before it makes.

    The first stage is given images with sides of `made` pixels; 0 for none.
    """
    for number, cfg in enumerate(configs, start=1):
        if cfg.lowres_size != made:
            raise UserError(
                f"stage {number} ({cfg.name}) takes {_images(cfg.lowres_size)}, but "
                f"what comes before it makes {_images(made)}: give the stages in "
                "order, base first, or pictures to start from"
            )
        made = cfg.image_size


def _images(side: int) -> str:
    return f"{side} pixel images" if side else "no images"


def batch_rows(batch_size: int, count: int, mesh: Mesh) -> int:
    """Rows of the program for `count` images in all, a multiple of the mesh's shards.

    A few images take less time one by one than in a batch that is filled up.
    """
    shards = row_shards(mesh)
    rows = 1 if count == 1 or 8 * count <= batch_size else batch_size
    return -(-rows // shards) * shards


def sample_stage(
    stage: Stage,
    numbers: np.ndarray,
    count: int,
    inputs: Callable[[np.ndarray], Inputs],
    settings: Settings,
    mesh: Mesh,
    recorded_steps: tuple[int, ...] = (),
    on_step: OnStep | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Makes images of one stage, batch by batch.

    A batch has the stage's `sampler.batch_size` rows, or one row where there are few
    images; the last one is filled up and cut. So two programs serve any number.

    Args:
      stage: with its parameters on the mesh.
      numbers: of the images to make, `[M]`, among `count`, on which alone it depends
        which program makes them.
      inputs: `[N]` of the numbers to what these images are made from.
      settings: those of all `count` images, each at least once.
      mesh: rows of a batch are split over its data and fsdp axes.
      recorded_steps, on_step: as in `sampler.sample`.

    Yields:
      the numbers of a batch `[N]`, its images `[N, H, W, 3]` and their estimates at the
      K recorded steps `[N, K, H, W, 3]`, uint8.
    """
    size = batch_rows(stage.cfg.sampler.batch_size, count, mesh)
    cfg = _program(stage.cfg, settings)
    run = compile_sampler(stage.apply, cfg, mesh, recorded_steps, on_step)
    place = functools.partial(jax.device_put, device=batch_sharding(mesh))
    for start in range(0, len(numbers), size):
        own = numbers[start : start + size]
        take = np.arange(size) % len(own)
        batch = jax.tree.map(lambda a, take=take: place(a[take]), inputs(own))
        out = run(stage.params, *batch)
        if mesh.is_multi_process:
            out = multihost_utils.process_allgather(out, tiled=True)
        out = jax.device_get(out)
        images, estimates = (a[: len(own)] for a in out)
        yield own, images, estimates


def sample_cascade(
    stages: Iterable[Stage],
    text: np.ndarray,
    mask: np.ndarray,
    seeds: np.ndarray,
    mesh: Mesh,
    lowres: np.ndarray | None = None,
    settings: Sequence[Settings] | None = None,
    recorded_steps: tuple[int, ...] = (),
    report: Callable[[int], None] = lambda images: None,
    on_step: OnStep | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs text through all stages, in the batches of `sample_stage`.

    Args:
      stages: base first, in an order that `check_order` accepts. A lazy iterator keeps
        the parameters of only one stage in memory.
      text, mask: `[N, L, D]` and `[N, L]`, N at least 1.
      seeds: `[N]`, one per image, in [0, 2**32).
      lowres: `[N, h, w, 3]` uint8, for a cascade that starts with a super-resolution
        stage.
      settings: for each stage those of its N images, instead of its config's.
      recorded_steps, on_step: as in `sampler.sample`.
      report: called with the number of images after each batch of each stage.

    Returns:
      For each stage its images, `[N, H, W, 3]` uint8, and for each stage the estimates
      at the recorded steps, `[N, K, H, W, 3]` uint8.
    """
    everyone = np.arange(len(seeds))
    images: list[np.ndarray] = []
    estimates: list[np.ndarray] = []
    before = lowres
    # Not `enumerate`, which would hold a stage while the next one is made.
    for stage in stages:
        i, sampler = len(images), stage.cfg.sampler
        own = settings[i] if settings else Settings.of(sampler, len(seeds))
        given = Inputs(seeds.astype(np.uint32), text, mask, *own, before)
        made = []
        for numbers, *out in sample_stage(
            stage,
            everyone,
            len(seeds),
            lambda rows, given=given: jax.tree.map(lambda a: a[rows], given),
            own,
            mesh,
            recorded_steps,
            on_step,
        ):
            made.append(out)
            report(len(numbers))
        del stage
        before, recorded = (np.concatenate(parts) for parts in zip(*made, strict=True))
        images.append(before)
        estimates.append(recorded)
    return images, estimates
