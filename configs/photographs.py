"""A cascade for photographs that one H100 or a v4-8 trains in days: 64 and 256 pixels.

--config=photographs:base or photographs:sr

base64.py's 300M network and sr256.py's with a quarter of its width, trained for as many
images as the networks of improved DDPM (arXiv 2102.09672, and the README of its code).
Plans, costs and all commands: docs/photographs.md. Neither stage was trained.
"""

from imagen_jax.configs import base64, common, sr256


def get_config(variant: str = ""):
    """`variant` is "base" or "sr"."""
    return common.pick({"base": base, "sr": sr}, variant)


def base():
    """Text to 64 pixels, in 256 million images.

    Improved DDPM took 192 million for 100M parameters and 512 million for 270M, also at
    64 pixels, with rates of 1e-4 and 3e-4; the paper takes 5,120 million.
    """
    cfg = _shared(base64.base(192))
    # Four parts take 29 GiB of an H100, and leave cuDNN some of it.
    cfg.training.update(batch_size=512, microbatches=4, steps=500_000)
    return cfg


def sr():
    """64 to 256 pixels, in 128 million images.

    Improved DDPM's upsampler of these sizes, 280M parameters, had the same batch, steps
    and rate.
    """
    cfg = _shared(sr256.sr256())
    cfg.model.channels = (32, 64, 128, 256)
    cfg.model.head_channels = 64  # 8 heads, as there
    cfg.training.update(batch_size=256, steps=500_000)
    cfg.optimizer.learning_rate = 3e-4
    return cfg


def _shared(cfg):
    # T5-large, which fits beside whatever else there is; what 4096 would be projected
    # to is as wide.
    cfg.text.dim = 1024
    cfg.model.text_features = 0
    # There is one host. The loss of 11,000 pictures of CC12M tells when it is enough.
    cfg.data.update(readers=0, heldout_share=0.001)
    return cfg
