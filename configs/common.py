"""What every config starts from: the defaults of `imagen_jax/config.py`."""

import dataclasses

import ml_collections

from imagen_jax.config import StageConfig


def get_config() -> ml_collections.ConfigDict:
    """All groups and fields; a config file changes only what differs."""
    return ml_collections.ConfigDict(dataclasses.asdict(StageConfig()))


def paper() -> ml_collections.ConfigDict:
    """What the paper's three stages share (arXiv 2205.11487, Sec. 4.1, App. F)."""
    cfg = get_config()
    cfg.model.dtype = "bfloat16"  # ours: precision is not stated
    cfg.diffusion.update(prediction="eps", text_dropout=0.1)  # printed
    # The encoder, T5-XXL, is printed; the length is ours, that of the peers.
    cfg.text.update(length=128, dim=4096)
    cfg.training.update(batch_size=2048, steps=2_500_000)  # printed
    # The hosts of a v4-512, and a shuffle buffer of 1,600 for each.
    cfg.data.update(readers=64, shuffle_examples=102_400)
    # Printed, but for the end value of 2500000, plainly a slip: ours is 0.
    cfg.optimizer.update(learning_rate=1e-4, warmup_steps=10_000, decay_steps=2_500_000)
    # Ours: EMA and clipping are not mentioned; 0.9999 is the family's.
    cfg.optimizer.update(ema_decay=0.9999, clip_norm=1.0)
    # Dynamic thresholding is printed, and its only percentile (Fig. A.10).
    cfg.sampler.update(threshold="dynamic", percentile=99.5)
    return cfg


def shrink(cfg: ml_collections.ConfigDict, size: int) -> ml_collections.ConfigDict:
    """A paper stage that a CPU trains in a minute, with the same network but for sizes.

    Its pictures have `size` pixels, and of four levels the second is left out. Learning
    is faster and shorter, computing in float32.
    """
    factor = cfg.image_size // size
    cfg.image_size = size
    cfg.lowres_size //= factor
    cfg.crop_size //= factor
    model = cfg.model
    for name in ("self_attention", "text_attention"):
        model[name] = model[name][:1] + model[name][2:]
    model.update(channels=(32, 48, 64), num_res_blocks=(1, 2, 2), head_channels=16)
    model.text_features = model.text_features and 32
    model.dtype = "float32"
    cfg.text.update(length=16, dim=64)
    cfg.training.update(batch_size=8, steps=200)
    cfg.data.update(readers=0, shuffle_examples=1000)
    cfg.optimizer.update(learning_rate=1e-3, warmup_steps=20, decay_steps=200)
    cfg.optimizer.ema_decay = 0.99
    cfg.sampler.update(steps=16, batch_size=4)
    return cfg


def pick(variants: dict, variant: str) -> ml_collections.ConfigDict:
    """The config that the part after the colon of --config names."""
    if variant not in variants:
        names = " or ".join(f":{name}" for name in variants)
        raise ValueError(f"this config has variants: write {names} after the file name")
    return variants[variant]()
