"""The paper's base: text to 64 pixels (arXiv 2205.11487, App. F.1, Sec. 4.1).

--config=base64[:2b | :1b | :500m | :300m | :tiny]

[P] is printed in the paper, [O] ours where it is silent; the reason stands beside it.
"""

import functools

from imagen_jax.configs import common


def get_config(variant: str = "2b"):
    """The paper's 2B network, its smaller ablations (D.3), or one for a CPU."""
    # [P] 2B has embed_dim 512. [O] The widths of the ablations (D.3) are not printed.
    # 192 is ADM's; the others come nearest among multiples of a head's 64 channels.
    # Parameters: 2,183M, 873M, 568M and 329M.
    widths = {"2b": 512, "1b": 320, "500m": 256, "300m": 192}
    variants = {name: functools.partial(base, w) for name, w in widths.items()}
    return common.pick({**variants, "tiny": tiny}, variant)


def base(width: int):
    """The paper's network and training, with another width."""
    cfg = common.paper()
    cfg.name = "base"
    cfg.image_size = 64
    cfg.model.update(
        architecture="unet",  # [P] Sec. 2.5 and F.1: as in improved DDPM and ADM
        channels=tuple(width * m for m in (1, 2, 3, 4)),  # [P]
        # [P] Blocks take the embeddings of time and pooled text by scale and shift, and
        # halve and double (App. F.1). [O] They double by nearest neighbours, as ADM's.
        num_res_blocks=(3, 3, 3, 3),  # [P]
        self_attention=(False, True, True, True),  # [P] at 32, 16 and 8
        text_attention=(False, True, True, True),  # [P] at 32, 16 and 8
        text_conditioning="concatenate",  # [P] D.3.1
        head_channels=64,  # [P]
        # [O] With keys and values from all 4096 the text would add 0.3B to ADM's 2.10B.
        text_features=1024,
    )
    cfg.diffusion.schedule = "cosine"  # [P]
    # [P] Adafactor with optax's defaults. [O] All but one: steps that scale with the
    # parameters start at 1e-7 where convolutions start at zero, and 200 steps of the
    # tiny form leave the loss at 0.99 (docs/decisions.md).
    cfg.optimizer.update(name="adafactor", parameter_scale=False)
    # [P] Guidance of Table 1. [O] Steps and gamma as in Imagen's successors.
    cfg.sampler.update(name="ddpm", steps=256, gamma=0.1, guidance=1.35)
    return cfg


def tiny():
    """The same with 16 pixels, for a CPU."""
    return common.shrink(base(512), 16)
