"""A cascade that a laptop trains in minutes: captioned shapes of 16 and 32 pixels.

python -m imagen_jax.prepare --source=shapes:20000 --image_size=32 \
    --output=runs/shapes --encoder=tiny --text_length=16
python -m imagen_jax.train --config=tiny:base --workdir=runs/base \
    --config.data.records=runs/shapes
python -m imagen_jax.train --config=tiny:sr --workdir=runs/sr \
    --config.data.records=runs/shapes

The values are ours, measured to be good on two CPU cores (benchmarks/README.md).
"""

from imagen_jax.configs import common


def get_config(variant: str = ""):
    """`variant` is "base" or "sr"."""
    return common.pick({"base": base, "sr": sr}, variant)


def base():
    """Text to 16 pixels."""
    cfg = _shared()
    cfg.name = "base"
    cfg.image_size = 16
    cfg.model.update(
        architecture="unet",
        channels=(64, 96),
        num_res_blocks=(1, 1),
        self_attention=(False, True),
        text_attention=(True, True),
        # A pretrained encoder's 384 channels take longer, and teach no more.
        text_features=64,
        patch_size=2,
    )
    # Shapes are learnt in 1,700 steps for which "plain" needs 2,900.
    cfg.diffusion.update(weighting="sigmoid", sigmoid_bias=0.0)
    cfg.training.steps = 2900
    cfg.optimizer.learning_rate = 3e-3
    cfg.sampler.update(name="dpmpp", steps=25, guidance=3.0)
    return cfg


def sr():
    """16 to 32 pixels."""
    cfg = _shared()
    cfg.name = "sr"
    cfg.image_size = 32
    cfg.lowres_size = 16
    cfg.model.update(
        architecture="efficient_unet",
        channels=(32, 64),
        num_res_blocks=(1, 1),
        skip_scale=0.5**0.5,
        self_attention=(False, True),
        text_attention=(False, True),
    )
    # The noise that eps and v reproduce cannot pass the network's 32 channels at
    # 16 x 16; x0 has none.
    cfg.diffusion.prediction = "x0"
    cfg.training.update(steps=1500, batch_size=16)
    cfg.sampler.update(steps=16, guidance=1.0, aug_level=0.1)
    return cfg


def _shared():
    cfg = common.get_config()
    cfg.model.head_channels = 32
    cfg.model.dtype = "float32"
    cfg.diffusion.prediction = "v"
    # What --encoder=tiny prepares, so that the benchmark and the plan need no records.
    cfg.text.update(length=16, dim=64)
    cfg.optimizer.update(warmup_steps=100, learning_rate=2e-3, b2=0.99, ema_decay=0.995)
    cfg.training.update(
        batch_size=32,
        log_every_steps=50,
        sample_every_steps=1000,
        checkpoint_every_steps=1000,
    )
    cfg.sampler.update(name="ddim", steps=32, threshold="static", aug_level=0.1)
    return cfg
