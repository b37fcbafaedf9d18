"""The paper's first super-resolution stage: 64 to 256 pixels (App. B.1, F.2).

--config=sr256[:tiny]

[P] is printed in the paper, [O] ours where it is silent; the reason stands beside it.
"""

from imagen_jax.configs import common


def get_config(variant: str = "600m"):
    """The paper's 600M network, or one for a CPU."""
    return common.pick({"600m": sr256, "tiny": tiny}, variant)


def sr256():
    """Efficient U-Net of blocks 128, 256, 512, 1024 x 2, 4, 8, 8."""
    cfg = common.paper()
    cfg.name = "sr256"
    cfg.image_size = 256
    cfg.lowres_size = 64
    cfg.model.update(
        architecture="efficient_unet",  # [P]
        channels=(128, 256, 512, 1024),  # [P]
        # [P] Fig. A.28 combines time and pooled text with the input of a level, once.
        # [O] Here every block takes them, by the scale and shift that F.2 also prints.
        # [P] Up-sampling is a "Conv strides=stride" (Fig. A.29). [O] Of which kind it
        # does not say: here nearest neighbours and then a convolution.
        num_res_blocks=(2, 4, 8, 8),  # [P]
        self_attention=(False, False, False, True),  # [P]
        text_attention=(False, False, False, True),  # [P]
        text_conditioning="concatenate",  # [P] D.3.1
        # [P] 8 heads, and hidden_size = 2 x channels (Fig. A.28): 2048 / 8.
        head_channels=256,
        # [P] B.1 scales skips by 1 / sqrt(2). [O] It does not say which: here the sums
        # of residual blocks, as in the two papers that it cites, and of attention. In
        # the small a training begins faster without (docs/claims.md).
        skip_scale=0.5**0.5,
        # [O] With every block's output the printed blocks have 605M parameters, with
        # the last one's (Fig. A.29) 507M; the paper says 600M (Sec. 4.1).
        skips="every_block",
    )
    cfg.diffusion.schedule = "cosine"  # [P]
    # [P] F.2: "standard Adam", as Adafactor hurt (Sec. 4.1).
    cfg.optimizer.update(name="adam", b1=0.9, b2=0.999, eps=1e-8)
    # [P] Guidance of Table 1; augmentation of 0.1 to 0.3 looks best, and none has the
    # best FID (A.11). [O] Steps.
    cfg.sampler.update(name="ddpm", steps=128, gamma=0.1, guidance=8.0, aug_level=0.1)
    return cfg


def tiny():
    """The same with 32 pixels, for a CPU."""
    return common.shrink(sr256(), 32)
