"""What every config starts from: the defaults of `imagen_jax/config.py`."""

import dataclasses

import ml_collections

from imagen_jax.config import StageConfig


def get_config() -> ml_collections.ConfigDict:
    """All groups and fields; a config file changes only what differs."""
    return ml_collections.ConfigDict(dataclasses.asdict(StageConfig()))


def paper() -> ml_collections.ConfigDict:
    """What the paper's three stages share (arXiv 2205.11487, Sec. 4.1, App. F).

    [P] is printed in the paper, [O] ours where it is silent.
    """
    cfg = get_config()
    cfg.model.dtype = "bfloat16"  # [O] precision is not stated
    # [P] And 10 % of captions have zeros for embeddings. [O] Their mask is False, too:
    # nothing attends to the null text, whatever LayerNorm makes of zeros.
    cfg.diffusion.update(prediction="eps", text_dropout=0.1)
    # [P] LayerNorm on the text in attention and pooling layers. [O] Where: in each of
    # these, after the projection to text_features.
    cfg.model.text_norm = True
    # [O] How a network is told the noise is not printed: log-SNR is mapped to (0, 1) by
    # the inverse of the cosine schedule, whatever the schedule, and embedded like time
    # (`noise_features` in models/layers.py; arXiv 2202.00512).
    # [P] T5-XXL. [O] Its length is that of other diffusion models with T5.
    cfg.text.update(length=128, dim=4096)
    cfg.training.update(batch_size=2048, steps=2_500_000)  # [P]
    # [O] The hosts of a v4-512, with a shuffle buffer of 1,600 examples each.
    cfg.data.update(readers=64, shuffle_examples=102_400)
    # [P] And a decay over all steps, to a value printed as 2500000, a slip: ours is 0.
    cfg.optimizer.update(learning_rate=1e-4, warmup_steps=10_000)
    # [O] EMA and clipping are not mentioned; 0.9999 is usual for diffusion models.
    cfg.optimizer.update(ema_decay=0.9999, clip_norm=1.0)
    # [P] Dynamic thresholding, and its only percentile (Fig. A.10).
    cfg.sampler.update(threshold="dynamic", percentile=99.5)
    return cfg


def shrink(cfg: ml_collections.ConfigDict, size: int) -> ml_collections.ConfigDict:
    """A paper stage that a CPU trains in a minute: the same network, but smaller.

    Its images have sides of `size` pixels, the second of the four levels is left out,
    the training is short with a higher learning rate, and float32 is computed in.
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
    cfg.optimizer.update(learning_rate=1e-3, warmup_steps=20)
    cfg.optimizer.ema_decay = 0.99
    cfg.sampler.update(steps=16, batch_size=4)
    return cfg


def pick(variants: dict, variant: str) -> ml_collections.ConfigDict:
    """The config that is named after the colon in --config=FILE:VARIANT."""
    if variant not in variants:
        names = " or ".join(f":{name}" for name in variants)
        raise ValueError(f"this config has variants: write {names} after its name")
    return variants[variant]()
