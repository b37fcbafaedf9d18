"""Which values of a stage's config fit together; `config.py` has each field's own."""

import operator
from collections.abc import Iterator
from typing import Any

from imagen_jax.errors import UserError


def check_stage(cfg: Any) -> None:
    """Raises `UserError` for the first value of a `StageConfig` that does not fit."""
    for faults in (_model, _sizes, _sampling, _training):
        for path, advice in faults(cfg):
            value = operator.attrgetter(path)(cfg)
            raise UserError(f"config.{path} is {value!r}; {advice}")


def _model(cfg: Any) -> Iterator[tuple[str, str]]:
    model, levels = cfg.model, len(cfg.model.channels)
    if not 0 < levels <= 17:
        yield "model.channels", "the network needs at least one level, and at most 17"
    for name in ("num_res_blocks", "self_attention", "text_attention"):
        if len(getattr(model, name)) != levels:
            yield f"model.{name}", f"give one per level: channels has {levels}"
    attends = map(operator.or_, model.self_attention, model.text_attention)
    for width, attention in zip(model.channels, attends, strict=True):
        if attention and width % model.head_channels:
            multiple = f"a multiple of head_channels, which is {model.head_channels}"
            yield "model.channels", f"{width} has attention and must be {multiple}"
    if model.architecture == "unet" and model.skips != "every_block":
        yield "model.skips", "only the efficient_unet can do with one skip per level"


def _sizes(cfg: Any) -> Iterator[tuple[str, str]]:
    patch, levels = cfg.model.patch_size, len(cfg.model.channels)
    halvings = levels - (cfg.model.architecture == "unet")
    multiple = patch * 2**halvings
    for name in ("image_size", "crop_size"):
        if getattr(cfg, name) % multiple:
            why = f"(patch_size {patch} x {halvings} halvings)"
            yield name, f"this network needs a multiple of {multiple} {why}"
    if cfg.crop_size > cfg.image_size:
        yield "crop_size", f"at most image_size, {cfg.image_size}; 0 is whole images"
    if cfg.lowres_size:
        ratio, rest = divmod(cfg.image_size, cfg.lowres_size)
        if rest or ratio < 2 or ratio & (ratio - 1):
            yield (
                "lowres_size",
                f"image_size {cfg.image_size} must be 2, 4, 8, ... times it",
            )
        elif cfg.crop_size % ratio:
            yield "crop_size", f"it must be a multiple of {ratio}, the enlargement"


def _sampling(cfg: Any) -> Iterator[tuple[str, str]]:
    trained, sampler = cfg.diffusion, cfg.sampler
    for name, clip in (("diffusion", trained), ("sampler", sampler)):
        if clip.logsnr_min >= clip.logsnr_max:
            above = f"it must be below logsnr_max, which is {clip.logsnr_max}"
            yield f"{name}.logsnr_min", above
    trained_range = f"training has only {trained.logsnr_min} to {trained.logsnr_max}"
    if sampler.logsnr_min >= trained.logsnr_max:
        yield "sampler.logsnr_min", trained_range
    if sampler.logsnr_max <= trained.logsnr_min:
        yield "sampler.logsnr_max", trained_range
    if len(sampler.guidance_schedule) not in (0, sampler.steps):
        advice = f"give {sampler.steps} weights, one per step, or () to use guidance"
        yield "sampler.guidance_schedule", advice
    if cfg.lowres_size and sampler.aug_level and not trained.lowres_augmentation:
        off = "with config.diffusion.lowres_augmentation off the stage learns from"
        yield "sampler.aug_level", f"{off} clean low-resolution images: set it to 0"


def _training(cfg: Any) -> Iterator[tuple[str, str]]:
    training, warmup = cfg.training, cfg.optimizer.warmup_steps
    if 0 < training.spike_factor <= 1:
        yield "training.spike_factor", "take more than 1, or 0 for no spikes"
    if training.keep_every_steps % training.checkpoint_every_steps:
        every = f"checkpoint_every_steps, which is {training.checkpoint_every_steps}"
        yield "training.keep_every_steps", f"it must be a multiple of {every}"
    if 0 < cfg.optimizer.decay_steps <= warmup:
        later = f"the rate rises for {warmup} steps and decays after them"
        yield "optimizer.decay_steps", f"{later}; -1 keeps it at its peak"
