"""Which values a stage's config may have."""

from typing import Any

from imagen_jax.errors import UserError, did_you_mean

_CHOICES = {
    "model.architecture": ("unet", "efficient_unet"),
    "model.text_conditioning": (
        "concatenate",
        "cross",
        "attention_pool",
        "mean_pool",
    ),
    "model.skips": ("every_block", "last_block"),
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("none", "activations", "blocks"),
    "diffusion.schedule": ("cosine", "linear"),
    "diffusion.prediction": ("eps", "x0", "v"),
    "diffusion.weighting": ("plain", "min_snr", "sigmoid"),
    "data.square": ("middle", "random"),
    "training.on_spent_budget": ("stop", "rollback"),
    "optimizer.name": ("adam", "adafactor"),
    "sampler.name": ("ddpm", "ddim", "dpmpp"),
    "sampler.schedule": ("trained", "cosine", "linear"),
    "sampler.grid": ("time", "logsnr"),
    "sampler.threshold": ("none", "static", "dynamic"),
}
_POSITIVE = (
    "image_size",
    "model.head_channels",
    "model.patch_size",
    "model.skip_scale",
    "diffusion.min_snr_gamma",
    "data.shuffle_examples",
    "text.length",
    "text.dim",
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "training.batch_size",
    "training.microbatches",
    "training.steps",
    "training.log_every_steps",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.preview_images",
    "sampler.steps",
    "sampler.batch_size",
)
_NOT_NEGATIVE = (
    "lowres_size",
    "crop_size",
    "model.text_features",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "training.sample_every_steps",
    "training.keep_every_steps",
    "training.keep_best_checkpoints",
    "training.skip_budget_steps",
    "training.hang_seconds",
)
# Far more than any network has, so that a file of a stranger cannot ask for one that
# takes for ever to trace.
_AT_MOST = {
    "image_size": 2**14,
    "lowres_size": 2**14,
    "crop_size": 2**14,
    "text.length": 2**16,
    "text.dim": 2**16,
    "sampler.steps": 2**16,
    "sampler.batch_size": 2**16,
}
_MOST_LEVELS = 16
_MOST_BLOCKS = 1024
_MOST_CHANNELS = 2**16
_BELOW_ONE = ("model.dropout", "optimizer.b1", "optimizer.b2")
_UNIT_INTERVAL = (
    "diffusion.text_dropout",
    "optimizer.ema_decay",
    "sampler.gamma",
    "sampler.aug_level",
)


def _get(cfg: Any, path: str) -> Any:
    for name in path.split("."):
        cfg = getattr(cfg, name)
    return cfg


def check_stage(cfg: Any) -> None:
    """Raises `UserError` for the first value of a `StageConfig` that cannot be."""
    for path, allowed in _CHOICES.items():
        value = _get(cfg, path)
        if value not in allowed:
            hint = did_you_mean(str(value), allowed)
            raise UserError(
                f"config.{path} is {value!r}; it takes one of {list(allowed)}{hint}"
            )
    for path in _POSITIVE:
        if not _get(cfg, path) > 0:
            raise UserError(
                f"config.{path} is {_get(cfg, path)}; it must be above zero"
            )
    for path in _NOT_NEGATIVE:
        if _get(cfg, path) < 0:
            raise UserError(f"config.{path} is {_get(cfg, path)}; 0 turns it off")
    for path, most in _AT_MOST.items():
        if _get(cfg, path) > most:
            raise UserError(f"config.{path} is {_get(cfg, path)}; it is {most} at most")
    for path in _BELOW_ONE:
        if not 0 <= _get(cfg, path) < 1:
            raise UserError(f"config.{path} is {_get(cfg, path)}; it must be in [0, 1)")
    for path in _UNIT_INTERVAL:
        if not 0 <= _get(cfg, path) <= 1:
            raise UserError(f"config.{path} is {_get(cfg, path)}; it must be in [0, 1]")
    if cfg.data.readers < 0:
        raise UserError(
            f"config.data.readers is {cfg.data.readers}; give a divisor of "
            "config.training.batch_size, at least the number of hosts, or 0 for what "
            "suits the records"
        )
    factor = cfg.training.spike_factor
    if factor and not factor > 1:
        raise UserError(
            f"config.training.spike_factor is {factor}; a spike is more than once the "
            "average: use a value above 1, or 0 for no spikes"
        )
    if not 0 < cfg.sampler.percentile <= 100:
        raise UserError(
            f"config.sampler.percentile is {cfg.sampler.percentile}; "
            "it must be in (0, 100] (the paper's is 99.5)"
        )
    for name, clip in (("diffusion", cfg.diffusion), ("sampler", cfg.sampler)):
        if clip.logsnr_min >= clip.logsnr_max:
            raise UserError(
                f"config.{name}.logsnr_min is {clip.logsnr_min}; it must be "
                f"below logsnr_max, which is {clip.logsnr_max}"
            )
    lowest = max(cfg.diffusion.logsnr_min, cfg.sampler.logsnr_min)
    highest = min(cfg.diffusion.logsnr_max, cfg.sampler.logsnr_max)
    if lowest >= highest:
        raise UserError(
            f"config.sampler samples log-SNRs from {cfg.sampler.logsnr_min} to "
            f"{cfg.sampler.logsnr_max}, of which the training has none: it has "
            f"{cfg.diffusion.logsnr_min} to {cfg.diffusion.logsnr_max}"
        )
    training = cfg.training
    if training.keep_every_steps % training.checkpoint_every_steps:
        raise UserError(
            f"config.training.keep_every_steps is {training.keep_every_steps}; it must "
            "be a multiple of checkpoint_every_steps, which is "
            f"{training.checkpoint_every_steps}"
        )
    schedule = cfg.sampler.guidance_schedule
    if schedule and len(schedule) != cfg.sampler.steps:
        raise UserError(
            f"config.sampler.guidance_schedule has {len(schedule)} weights for "
            f"{cfg.sampler.steps} steps; give one per step, or () to use guidance"
        )
    if 0 < cfg.optimizer.decay_steps <= cfg.optimizer.warmup_steps:
        raise UserError(
            f"config.optimizer.decay_steps is {cfg.optimizer.decay_steps}; the rate "
            f"warms up for {cfg.optimizer.warmup_steps} steps and decays after them"
        )
    model = cfg.model
    levels = len(model.channels)
    if (
        not levels
        or min(model.channels) < 1
        or min(model.num_res_blocks, default=1) < 1
    ):
        raise UserError(
            "config.model.channels and num_res_blocks need at least one level, and "
            f"values above zero; they are {model.channels} and {model.num_res_blocks}"
        )
    most = max(model.channels)
    blocks = sum(model.num_res_blocks)
    if levels > _MOST_LEVELS or most > _MOST_CHANNELS or blocks > _MOST_BLOCKS:
        raise UserError(
            f"config.model has {levels} levels, {blocks} blocks and up to {most} "
            f"channels; it has at most {_MOST_LEVELS}, {_MOST_BLOCKS} and "
            f"{_MOST_CHANNELS}"
        )
    for name in ("num_res_blocks", "self_attention", "text_attention"):
        if len(getattr(model, name)) != levels:
            raise UserError(
                f"config.model.{name} has {len(getattr(model, name))} entries, "
                f"config.model.channels has {levels}: give one per level"
            )
    for level, channels in enumerate(model.channels):
        attends = model.self_attention[level] or model.text_attention[level]
        if attends and channels % model.head_channels:
            raise UserError(
                f"config.model.channels has a level of {channels} with attention; "
                f"it must be a multiple of head_channels={model.head_channels}"
            )
    if model.architecture == "unet" and model.skips != "every_block":
        raise UserError(
            f"config.model.skips is {model.skips!r}; only the efficient_unet can do "
            "with one skip per level"
        )
    downs = levels if model.architecture == "efficient_unet" else levels - 1
    multiple = model.patch_size * 2**downs
    for name, size in (("image_size", cfg.image_size), ("crop_size", cfg.crop_size)):
        if size % multiple:
            raise UserError(
                f"config.{name} is {size}; this network needs a multiple of {multiple} "
                f"(patch_size {model.patch_size} x {downs} halvings)"
            )
    if cfg.crop_size > cfg.image_size:
        raise UserError(
            f"config.crop_size is {cfg.crop_size}, larger than image_size "
            f"{cfg.image_size}; use 0 to train on whole pictures"
        )
    if cfg.lowres_size:
        if cfg.sampler.aug_level and not cfg.diffusion.lowres_augmentation:
            raise UserError(
                f"config.sampler.aug_level is {cfg.sampler.aug_level}, but with "
                "config.diffusion.lowres_augmentation off the stage learns from clean "
                "low-resolution pictures; set the level to 0"
            )
        ratio, rest = divmod(cfg.image_size, cfg.lowres_size)
        if rest or ratio < 2 or ratio & (ratio - 1):
            raise UserError(
                f"config.lowres_size is {cfg.lowres_size} and image_size "
                f"{cfg.image_size}; their ratio must be 2, 4, 8, ..."
            )
        if cfg.crop_size % ratio:
            raise UserError(
                f"config.crop_size is {cfg.crop_size}; it must be a multiple of "
                f"image_size / lowres_size = {ratio}"
            )
