"""Values of a config that are refused because of other values."""

import pytest

from imagen_jax import config
from imagen_jax.errors import UserError

EFFICIENT = {"architecture": "efficient_unet"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"channels": ()}},
            "model.channels is (); the network needs at least one level",
        ),
        (
            {"model": {"num_res_blocks": (3, 3)}},
            "model.num_res_blocks is (3, 3); give one per level: channels has 4",
        ),
        (
            {"model": {"self_attention": (True,)}},
            "model.self_attention is (True,); give one per level",
        ),
        (
            {"model": {"text_attention": (True,)}},
            "model.text_attention is (True,); give one per level",
        ),
        (
            {"model": {"head_channels": 48}},
            "1024 has attention and must be a multiple of head_channels, which is 48",
        ),
        (
            {"model": {"skips": "last_block"}},
            "model.skips is 'last_block'; only the efficient_unet",
        ),
        # Three halvings, or four, of patches.
        ({"image_size": 60}, "image_size is 60; this network needs a multiple of 8"),
        ({"image_size": 72, "model": EFFICIENT}, "of 16 (patch_size 1 x 4 halvings)"),
        ({"image_size": 72, "model": {"patch_size": 2}}, "of 16 (patch_size 2 x 3"),
        ({"crop_size": 12}, "config.crop_size is 12; this network needs a multiple"),
        ({"crop_size": 128}, "crop_size is 128; at most image_size, 64; 0 is whole"),
        (
            {"lowres_size": 64},
            "lowres_size is 64; image_size 64 must be 2, 4, 8, ... times it",
        ),
        ({"lowres_size": 48}, "image_size 64 must be 2, 4, 8, ... times it"),
        (
            {"image_size": 192, "lowres_size": 64},
            "image_size 192 must be 2, 4, 8, ... times it",
        ),
        (
            {"image_size": 128, "lowres_size": 4, "crop_size": 40},
            "crop_size is 40; it must be a multiple of 32, the enlargement",
        ),
        (
            {"diffusion": {"logsnr_min": 20.0}},
            "diffusion.logsnr_min is 20.0; it must be below logsnr_max, which is 20.0",
        ),
        (
            {"sampler": {"logsnr_min": 5.0, "logsnr_max": 4.0}},
            "sampler.logsnr_min is 5.0; it must be below logsnr_max",
        ),
        (
            {"sampler": {"logsnr_max": -12.0}, "diffusion": {"logsnr_min": -10.0}},
            "sampler.logsnr_max is -12.0; training has only -10.0 to 20.0",
        ),
        (
            {"sampler": {"logsnr_min": 12.0}, "diffusion": {"logsnr_max": 10.0}},
            "sampler.logsnr_min is 12.0; training has only -20.0 to 10.0",
        ),
        (
            {"sampler": {"guidance_schedule": [1.0, 2.0], "steps": 3}},
            "guidance_schedule is (1.0, 2.0); give 3 weights, one per step, or ()",
        ),
        (
            {"lowres_size": 16, "diffusion": {"lowres_augmentation": False}},
            "aug_level is 0.1; with config.diffusion.lowres_augmentation off",
        ),
        (
            {"optimizer": {"warmup_steps": 9, "decay_steps": 9}},
            "the rate rises for 9 steps and decays after them; -1 keeps it at its peak",
        ),
        (
            {"training": {"spike_factor": 0.5}},
            "spike_factor is 0.5; take more than 1, or 0 for no spikes",
        ),
        (
            {"training": {"keep_every_steps": 7_500}},
            "keep_every_steps is 7500; it must be a multiple of checkpoint_every_steps",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(values, message):
    with pytest.raises(UserError) as error:
        config.from_dict(values)
    assert str(error.value).startswith("config.")
    assert message in str(error.value)


def test_a_level_without_attention_may_have_any_width():
    config.from_dict({"model": {"channels": (100, 64, 64, 64)}})
