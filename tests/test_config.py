"""Configs: what is refused and how it is said, and the way to JSON and back."""

import dataclasses
import json
import math
from typing import Annotated, Literal, get_args, get_origin

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


def _fields(cls=StageConfig, path=""):
    """Path, type and default of every field of every group."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{path}{field.name}.")
        else:
            yield path + field.name, field.type, field.default


FIELDS = {path: (kind, default) for path, kind, default in _fields()}


def _interval(kind):
    """The interval in the type of a number or of a tuple of numbers, or ""."""
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return get_args(kind)[1] if get_origin(kind) is Annotated else ""


def test_every_number_has_an_interval():
    for kind, _ in FIELDS.values():
        number = get_args(kind)[0] if get_origin(kind) is tuple else kind
        number = getattr(number, "__origin__", number)
        assert number not in (int, float) or _interval(kind)


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_takes_what_its_type_says_and_no_more(path):
    kind, default = FIELDS[path]
    if get_origin(kind) is Literal:
        words = list(get_args(kind))
        wrong = words[0] + "x"
        message = f"config.{path} is {wrong!r}; it takes one of {words}"
        _refused(_nest(path, wrong), message, f"(did you mean {words[0]!r}?)")
    interval = _interval(kind)
    if not interval:
        return
    low, high = map(float, interval[1:-1].split(","))
    is_tuple = isinstance(default, tuple)
    number = float if "float" in str(kind) else int

    def refused(value):
        values = [value] * max(1, len(default)) if is_tuple else value
        message = f"config.{path} is {value!r}; it must be in {interval}"
        _refused(_nest(path, values), message)

    step = 0.01 if number is float else 1
    if low > -math.inf:
        refused(number(low) - step)
    if interval[0] == "(" and low > -math.inf:
        refused(number(low))
    if high < math.inf:
        refused(number(high) + step)
    if interval[-1] == ")" and high < math.inf:
        refused(number(high))
    if number is float:
        for value in (math.nan, math.inf, -math.inf, 1e39, -1e39):
            refused(value)
    elif high == math.inf:
        refused(2**31)
        refused(2**64)


# As one that reads the papers would have them.
@pytest.mark.parametrize(
    ("interval", "paths"),
    [
        (
            "[1, inf)",
            "data.shuffle_examples training.batch_size training.steps "
            "training.log_every_steps training.checkpoint_every_steps "
            "training.keep_checkpoints training.preview_images training.microbatches",
        ),
        (
            "[1, 65536]",
            "image_size model.channels model.num_res_blocks model.head_channels "
            "model.patch_size sampler.steps sampler.batch_size",
        ),
        ("(0, inf)", "optimizer.learning_rate optimizer.clip_norm model.skip_scale"),
        (
            "[0, 1]",
            "diffusion.text_dropout optimizer.ema_decay sampler.gamma "
            "sampler.aug_level",
        ),
        ("[0, 1)", "model.dropout optimizer.b1 optimizer.b2"),
        ("(0, 100]", "sampler.percentile"),
        ("[0, 65536]", "text.length text.dim crop_size lowres_size"),
        ("[0, inf)", "training.hang_seconds optimizer.warmup_steps data.readers"),
    ],
)
def test_intervals(interval, paths):
    assert {_interval(FIELDS[path][0]) for path in paths.split()} == {interval}


@pytest.mark.parametrize("path", ["training.seed", "data.seed"])
def test_seeds_have_32_bits(path):
    for seed in (2**32, 2**64, -(2**31) - 1):
        _refused(_nest(path, seed), f"config.{path} is {seed}; it must be in [-21474")
    for seed in (0, -1, 2**32 - 1):
        config.from_dict(_nest(path, seed))


def test_an_integer_that_no_float_holds():
    _refused(_nest("optimizer.eps", 10**400), "config.optimizer.eps is 1000")


@pytest.mark.parametrize("path", ["optimizer.ema_decay", "sampler.gamma"])
def test_closed_ends_are_inside(path):
    for value in (0.0, 1.0):
        config.from_dict(_nest(path, value))
    config.from_dict({"model": {"dropout": 0.0}, "sampler": {"percentile": 100}})


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
    assert config.from_json(json.loads(text), "config.json") == cfg
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


def test_a_key_of_an_earlier_version_is_passed_over_where_it_changes_nothing():
    values = {"model": {"dropout": 0.1, "scan_blocks": False}}
    cfg = config.from_json(values, "run/config.json")
    assert cfg == config.from_dict({"model": {"dropout": 0.1}})
    with pytest.raises(
        UserError, match="^run/config.json: .*scan_blocks is True: .* train"
    ):
        config.from_json({"model": {"scan_blocks": True}}, "run/config.json")
    # Nobody types it any more.
    _refused({"model": {"scan_blocks": False}}, "model.scan_blocks does not exist")


@pytest.mark.parametrize(
    ("stored", "read", "now"), [(0, -1, 0), (9, 9, 9), (2_900, 2_900, 2_900)]
)
def test_a_decay_of_0_kept_the_peak_before_there_were_prompts(stored, read, now):
    cfg = config.from_dict(
        _nest("optimizer", {"decay_steps": stored, "warmup_steps": 1})
    )
    values = json.loads(config.to_json(cfg))
    assert config.from_json(values, "x").optimizer.decay_steps == now
    for name in ("preview_prompts", "encoder_weights"):
        del values["training"][name]
    assert config.from_json(values, "x").optimizer.decay_steps == read


def test_a_wrong_value_in_a_file_names_the_file():
    for values in ({"model": {"dropot": 0.1}}, {"model": 3}, [], None):
        with pytest.raises(UserError, match="^run/config.json: config"):
            config.from_json(values, "run/config.json")


def test_difference():
    old = StageConfig()
    new = config.from_dict({"name": "big", "model": {"dropout": 0.5}})
    assert config.difference(old, old) == []
    assert config.difference(old, new) == [
        "name: 'base' -> 'big'",
        "model.dropout: 0.0 -> 0.5",
    ]
