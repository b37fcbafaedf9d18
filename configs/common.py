"""What every config starts from: the defaults of `imagen_jax/config.py`."""

import dataclasses

import ml_collections

from imagen_jax.config import StageConfig


def get_config() -> ml_collections.ConfigDict:
    """All groups and fields; a config file changes only what differs."""
    return ml_collections.ConfigDict(dataclasses.asdict(StageConfig()))


def pick(variants: dict, variant: str) -> ml_collections.ConfigDict:
    """The config that the part after the colon of --config names."""
    if variant not in variants:
        names = " or ".join(f":{name}" for name in variants)
        raise ValueError(f"this config has variants: write {names} after the file name")
    return variants[variant]()
