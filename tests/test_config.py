"""Configs: what is refused and how it is said, and the way to JSON and back."""

import dataclasses
import json

import pytest

from imagen_jax import config
from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError, did_you_mean


def _refused(values, *messages):
    with pytest.raises(UserError) as error:
        config.from_dict(values)
    for message in messages:
        assert message in str(error.value), error.value


def _nest(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def test_what_is_left_out_keeps_its_default():
    cfg = config.from_dict({"model": {"dropout": 0.1}})
    model = dataclasses.replace(config.ModelConfig(), dropout=0.1)
    assert cfg == dataclasses.replace(StageConfig(), model=model)
    assert hash(cfg) == hash(config.from_dict({"model": {"dropout": 0.1}}))
    assert config.from_dict({}) == StageConfig()


@pytest.mark.parametrize(
    ("path", "near"),
    [("model.chanels", "channels"), ("samplr", "sampler"), ("sampler.step", "steps")],
)
def test_an_unknown_key_suggests_the_nearest(path, near):
    _refused(_nest(path, 1), f"config.{path} does not exist (did you mean '{near}'?)")


def test_a_far_off_key_suggests_nothing():
    _refused({"zzz": 1}, "config.zzz does not exist")
    assert did_you_mean("zzz", ["channels"]) == ""


@pytest.mark.parametrize(
    ("path", "value", "kind"),
    [
        ("training.steps", 1.0, "int"),
        ("training.steps", True, "int"),
        ("training.steps", "10", "int"),
        ("model.dropout", "0.1", "float"),
        ("model.dropout", True, "float"),
        ("name", 3, "str"),
        ("model.channels", (64, 64.0, 64, 64), "int"),
        ("model.self_attention", (1, 0, 0, 0), "bool"),
    ],
)
def test_a_wrong_type_is_named(path, value, kind):
    _refused(_nest(path, value), f"config.{path} is ", f"must be of type {kind}")


def test_groups_and_tuples_are_asked_for():
    _refused({"model": 3}, "config.model is 3; it must be a group of fields")
    _refused(_nest("model.channels", 64), "config.model.channels is 64", "a tuple")


def test_an_int_passes_for_a_float_and_a_list_for_a_tuple():
    cfg = config.from_dict(
        {"model": {"dropout": 0, "channels": [64, 64, 64, 64]}, "image_size": 64}
    )
    assert type(cfg.model.dropout) is float
    assert cfg.model.channels == (64, 64, 64, 64)


CHOICES = {
    "model.architecture": ["unet", "efficient_unet"],
    "model.dtype": ["bfloat16", "float32"],
    "diffusion.schedule": ["cosine", "linear"],
    "diffusion.prediction": ["eps", "x0", "v"],
    "diffusion.weighting": ["plain", "min_snr", "sigmoid"],
    "optimizer.name": ["adam", "adafactor"],
    "sampler.name": ["ddpm", "ddim", "dpmpp"],
    "sampler.schedule": ["trained", "cosine", "linear"],
    "sampler.grid": ["time", "logsnr"],
    "sampler.threshold": ["none", "static", "dynamic"],
}
COUNTS = (
    "image_size model.head_channels model.patch_size data.shuffle_examples "
    "text.length text.dim optimizer.learning_rate optimizer.clip_norm "
    "training.batch_size training.steps training.log_every_steps "
    "training.checkpoint_every_steps training.keep_checkpoints "
    "training.preview_images sampler.steps sampler.batch_size"
).split()
SHARES = (
    "diffusion.text_dropout optimizer.ema_decay sampler.gamma sampler.aug_level"
).split()


@pytest.mark.parametrize("path", CHOICES)
def test_choices(path):
    allowed = CHOICES[path]
    for value in allowed:
        config.from_dict(_nest(path, value))
    wrong = allowed[0] + "x"
    message = f"config.{path} is {wrong!r}; it takes one of {allowed}"
    _refused(_nest(path, wrong), message, f"(did you mean {allowed[0]!r}?)")


@pytest.mark.parametrize("path", COUNTS)
def test_counts_are_above_zero(path):
    kind = float if path.startswith("optimizer") else int
    for value in (kind(0), kind(-1)):
        _refused(_nest(path, value), f"config.{path} is {value}; it must be above zero")


def test_not_a_number_is_refused():
    nan = float("nan")
    _refused(_nest("optimizer.learning_rate", nan), "must be above zero")
    _refused(_nest("sampler.gamma", nan), "must be in [0, 1]")
    _refused(_nest("sampler.percentile", nan), "must be in (0, 100]")


@pytest.mark.parametrize("path", SHARES)
def test_shares_are_in_the_unit_interval(path):
    for value in (0.0, 1.0):
        config.from_dict(_nest(path, value))
    for value in (-0.01, 1.01):
        wrong = f"config.{path} is {value}; it must be in [0, 1]"
        _refused(_nest(path, value), wrong)


@pytest.mark.parametrize("path", ["model.dropout", "optimizer.b1", "optimizer.b2"])
def test_rates_are_below_one(path):
    config.from_dict(_nest(path, 0.0))
    for value in (-0.01, 1.0):
        wrong = f"config.{path} is {value}; it must be in [0, 1)"
        _refused(_nest(path, value), wrong)


EFFICIENT = {"architecture": "efficient_unet"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"diffusion": {"min_snr_gamma": 0.0}},
            "diffusion.min_snr_gamma is 0.0; it must be above zero",
        ),
        (
            {"sampler": {"logsnr_min": 5.0, "logsnr_max": 4.0}},
            "sampler.logsnr_min is 5.0; it must be below logsnr_max",
        ),
        (
            {"sampler": {"logsnr_max": -12.0}, "diffusion": {"logsnr_min": -10.0}},
            "from -20.0 to -12.0, of which the training has none",
        ),
        (
            {"sampler": {"guidance_schedule": [1.0, 2.0], "steps": 3}},
            "guidance_schedule has 2 weights for 3 steps",
        ),
        ({"sampler": {"percentile": 0.0}}, "sampler.percentile is 0.0; it must be in"),
        ({"sampler": {"percentile": 100.5}}, "percentile is 100.5"),
        (
            {"model": {"num_res_blocks": (3, 3)}},
            "config.model.num_res_blocks has 2 entries, config.model.channels has 4",
        ),
        ({"model": {"self_attention": (True,)}}, "config.model.self_attention has 1"),
        ({"model": {"text_attention": (True,)}}, "config.model.text_attention has 1"),
        ({"model": {"head_channels": 48}}, "a level of 1024 with attention; it must"),
        # Three halvings, or four, of patches.
        ({"image_size": 60}, "config.image_size is 60; this network needs a multiple"),
        ({"image_size": 72, "model": EFFICIENT}, "of 16 (patch_size 1 x 4 halvings)"),
        ({"image_size": 72, "model": {"patch_size": 2}}, "16 (patch_size 2 x 3"),
        ({"crop_size": -8}, "config.crop_size is -8; 0 turns it off"),
        ({"optimizer": {"warmup_steps": -1}}, "warmup_steps is -1; 0 turns it off"),
        (
            {"optimizer": {"warmup_steps": 9, "decay_steps": 9}},
            "decay_steps is 9; the rate warms up for 9 steps",
        ),
        ({"diffusion": {"logsnr_min": 20.0}}, "below logsnr_max, which is 20.0"),
        (
            {"model": {"num_res_blocks": (3, 3, 3, 0)}},
            "values above zero; they are (512, 1024, 1536, 2048) and (3, 3, 3, 0)",
        ),
        ({"model": {"skips": "last_block"}}, "skips is 'last_block'; only the eff"),
        ({"model": {"remat": "block"}}, "remat is 'block'; it takes one of"),
        (
            {"lowres_size": 16, "diffusion": {"lowres_augmentation": False}},
            "sampler.aug_level is 0.1, but with config.diffusion.lowres_augmentation",
        ),
        ({"crop_size": 12}, "config.crop_size is 12; this network needs a multiple"),
        ({"crop_size": 128}, "crop_size is 128, larger than image_size 64"),
        ({"lowres_size": 64}, "lowres_size is 64 and image_size 64; their ratio"),
        ({"lowres_size": 48}, "their ratio must be 2, 4, 8, ..."),
        ({"image_size": 192, "lowres_size": 64}, "their ratio must be 2, 4, 8, ..."),
        (
            {"image_size": 128, "lowres_size": 4, "crop_size": 40},
            "config.crop_size is 40; it must be a multiple of",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(values, message):
    _refused(values, message)


def test_a_level_without_attention_may_have_any_width():
    config.from_dict({"model": {"channels": (100, 64, 64, 64)}})


def test_checks_hold_however_a_config_is_made():
    with pytest.raises(UserError, match="image_size"):
        dataclasses.replace(StageConfig(), image_size=60)


def test_sizes_in_training():
    whole = config.from_dict({"image_size": 256, "lowres_size": 64})
    assert (whole.train_size, whole.train_lowres_size) == (256, 64)
    crop = dataclasses.replace(whole, crop_size=128)
    assert (crop.train_size, crop.train_lowres_size) == (128, 32)
    base = StageConfig()
    assert (base.train_size, base.train_lowres_size) == (64, 0)


def test_json_round_trip():
    cfg = config.from_dict(
        {
            "name": "sr",
            "image_size": 256,
            "lowres_size": 64,
            "model": {"dropout": 0.1, "architecture": "efficient_unet"},
            "optimizer": {"learning_rate": 1 / 3},
            "mesh": {"fsdp": 4},
        }
    )
    text = config.to_json(cfg)
    assert config.from_json(text) == cfg
    assert list(json.loads(text)) == [f.name for f in dataclasses.fields(cfg)]
    # All fields are in the file, so that a new default changes no old checkpoint.
    assert text.count(":") == len(config.difference(cfg, _all_other(cfg))) + 8


def _all_other(cfg):
    """A value no field has: `difference` must find them all."""

    class Other:
        def __eq__(self, other):
            return False

    def change(group):
        changed = object.__new__(type(group))
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            new = change(value) if dataclasses.is_dataclass(value) else Other()
            object.__setattr__(changed, field.name, new)
        return changed

    return change(cfg)


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_broken_json_names_the_file(text):
    with pytest.raises(UserError, match="run/config.json is not valid JSON"):
        config.from_json(text, "run/config.json")


def test_difference():
    old = StageConfig()
    new = config.from_dict({"name": "big", "model": {"dropout": 0.5}})
    assert config.difference(old, old) == []
    assert config.difference(old, new) == [
        "name: 'base' -> 'big'",
        "model.dropout: 0.0 -> 0.5",
    ]
