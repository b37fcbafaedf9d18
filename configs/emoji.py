"""A cascade for a folder of small captioned images: 32 to 64 pixels, on a CPU.

docs/emoji.md has the commands and their samples. The values are ours, chosen so that
each stage trains in about 25 minutes on two CPU cores.
"""

from imagen_jax.configs import common


def get_config(variant: str = ""):
    """`variant` is "base" or "sr"."""
    return common.pick({"base": base, "sr": sr}, variant)


def base():
    """Text to 32 pixels."""
    cfg = _shared()
    cfg.name = "base"
    cfg.image_size = 32
    cfg.model.update(
        architecture="unet",
        channels=(96, 192),
        num_res_blocks=(1, 1),
        self_attention=(False, True),
        text_attention=(True, True),
        patch_size=4,
    )
    cfg.training.steps = 7000
    cfg.sampler.update(steps=32, guidance=2.0)
    return cfg


def sr():
    """32 to 64 pixels."""
    cfg = _shared()
    cfg.name = "sr"
    cfg.image_size = 64
    cfg.lowres_size = 32
    cfg.model.update(
        architecture="efficient_unet",
        channels=(32, 64),
        num_res_blocks=(1, 2),
        skip_scale=0.5**0.5,
        self_attention=(False, True),
        text_attention=(False, True),
    )
    cfg.training.update(steps=4000, batch_size=16)
    cfg.sampler.update(steps=32, aug_level=0.1)
    return cfg


def _shared():
    cfg = common.get_config()
    cfg.model.head_channels = 32
    cfg.model.dtype = "float32"
    # The networks have too few channels for the noise that eps and v reproduce: 48
    # numbers in a folded pixel, beside what it shows.
    cfg.diffusion.prediction = "x0"
    cfg.text.length = 16
    cfg.optimizer.update(warmup_steps=100, learning_rate=2e-3, b2=0.99, ema_decay=0.998)
    cfg.training.update(
        batch_size=32,
        log_every_steps=50,
        sample_every_steps=1000,
        checkpoint_every_steps=1000,
    )
    cfg.sampler.update(name="ddim", threshold="static")
    return cfg
