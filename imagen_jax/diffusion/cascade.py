"""Stages in order: sample, quantise, augment, condition the next."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from imagen_jax.batch import Cond, to_float, to_uint8
from imagen_jax.compilation import compiler_options
from imagen_jax.config import StageConfig
from imagen_jax.diffusion.loss import augment
from imagen_jax.diffusion.sampler import sample
from imagen_jax.errors import UserError
from imagen_jax.sharding import batch_sharding, on_mesh, row_shards


@flax.struct.dataclass
class Stage:
    """A trained stage.

    Attributes:
      params: of the network, placed on the mesh.
      cfg: the stage's config; `cfg.sampler` says how it is sampled.
      apply: `(cfg.model, params, z, logsnr, cond) -> [B, H, W, 3]`; always the same
        function, or each new one compiles again.
    """

    params: Any
    cfg: StageConfig = flax.struct.field(pytree_node=False)
    apply: Callable[..., jax.Array] = flax.struct.field(pytree_node=False)


def sample_stage(
    params: Any,
    seeds: jax.Array,
    text: jax.Array,
    mask: jax.Array,
    lowres: jax.Array | None,
    *,
    apply: Callable[..., jax.Array],
    cfg: StageConfig,
) -> jax.Array:
    """One batch of one stage.

    Args:
      params: of the network.
      seeds: `[B]` uint32, one per picture.
      text: `[B, L, D]`; mask: `[B, L]` bool.
      lowres: `[B, h, w, 3]` uint8, or None for a base stage.
      apply: `(cfg.model, params, z, logsnr, cond) -> [B, H, W, 3]`.
      cfg: the stage.

    Returns:
      `[B, H, W, 3]` uint8.
    """
    # The size, not the position in a list, names the stage: a cascade entered
    # midway draws the same noise.
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), cfg.image_size))(
        seeds
    )
    key_sample, key_aug = jax.vmap(jax.random.split, out_axes=1)(keys)
    cond = Cond(text=text, mask=mask)
    if cfg.lowres_size:
        lowres = to_float(lowres)
        level = jnp.full(seeds.shape, cfg.sampler.aug_level)
        noise = jax.vmap(lambda k: jax.random.normal(k, lowres.shape[1:]))(key_aug)
        cond = augment(cond, lowres, level, noise, cfg)
    shape = (cfg.image_size, cfg.image_size, 3)
    denoise = functools.partial(apply, cfg.model, params)
    x0 = sample(denoise, key_sample, cond, shape, cfg.diffusion, cfg.sampler)
    return to_uint8(x0)


@functools.cache
def compile_sampler(
    apply: Callable[..., jax.Array], cfg: StageConfig, mesh: Mesh
) -> Callable[..., jax.Array]:
    """The jitted `sample_stage` of a stage; one program for all batches of it."""
    return jax.jit(
        on_mesh(functools.partial(sample_stage, apply=apply, cfg=cfg), mesh),
        compiler_options=compiler_options(mesh, dtype=cfg.model.dtype),
    )


def check_order(configs: Sequence[StageConfig]) -> None:
    """Raises `UserError` unless each stage takes what the one before it makes."""
    made = 0
    for i, cfg in enumerate(configs):
        if cfg.lowres_size != made:
            sizes = " -> ".join(
                f"{c.name} ({c.lowres_size or 'text'} to {c.image_size})"
                for c in configs
            )
            before = f"makes {made}" if i else "is missing: nothing comes before it"
            raise UserError(
                f"stage {i + 1} ({cfg.name}) takes {cfg.lowres_size or 'no'} pixel "
                f"pictures but the stage before it {before}. Given: {sizes}. "
                "Give the stages in order, base first"
            )
        made = cfg.image_size


def sample_cascade(
    stages: Sequence[Stage],
    text: np.ndarray,
    mask: np.ndarray,
    seeds: np.ndarray,
    mesh: Mesh,
    lowres: np.ndarray | None = None,
    report: Callable[[int], None] = lambda images: None,
) -> list[np.ndarray]:
    """Runs text through all stages.

    Every batch has the stage's `sampler.batch_size` rows (the last is filled up and
    cut), so one program serves any number of pictures.

    Args:
      stages: base first; `check_order` holds.
      text: `[N, L, D]`; mask: `[N, L]`.
      seeds: `[N]`, one per picture, in [0, 2**32).
      mesh: rows of a batch are spread over its data and fsdp axes.
      lowres: `[N, h, w, 3]` uint8, for a cascade that starts with a super-resolution
        stage.
      report: told the number of pictures after each batch of each stage.

    Returns:
      For each stage `[N, H, W, 3]` uint8.

    Raises:
      UserError: for no pictures at all.
    """
    if not len(seeds):
        raise UserError("there is nothing to sample: no captions were given")
    rows = row_shards(mesh)
    place = functools.partial(jax.device_put, device=batch_sharding(mesh))
    pictures: list[np.ndarray] = []
    before = lowres
    for stage in stages:
        size = -(-stage.cfg.sampler.batch_size // rows) * rows
        run = compile_sampler(stage.apply, stage.cfg, mesh)
        made = []
        for start in range(0, len(seeds), size):
            take = np.arange(start, start + size) % len(seeds)
            out = run(
                stage.params,
                place(seeds[take].astype(np.uint32)),
                place(text[take]),
                place(mask[take]),
                None if before is None else place(before[take]),
            )
            out = multihost_utils.process_allgather(out, tiled=True)
            made.append(out[: len(seeds) - start])
            report(len(made[-1]))
        before = np.concatenate(made)
        pictures.append(before)
    return pictures
