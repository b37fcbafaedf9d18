"""imagen-jax: train and sample Imagen (arXiv 2205.11487) cascades with JAX.

`load_cascade` and `train` are imported when they are first used, and JAX with them.
"""

import importlib
import os
import sys
import types
import typing
import warnings

if typing.TYPE_CHECKING:
    from imagen_jax.api.library import load_cascade
    from imagen_jax.api.run import train

__version__ = "0.2.0"
__all__ = ["load_cascade", "train"]

# JAX warns of the settings of TPUs as it is imported, whether or not it may use one.
if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
    warnings.filterwarnings("ignore", module=r"jax\._src\.cloud_tpu_init")

_FILES = {"load_cascade": "library", "train": "run"}


def __getattr__(name: str) -> typing.Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """As Python imports the command `imagen_jax.train`, the function keeps its name."""

    def __setattr__(self, name: str, value: typing.Any) -> None:
        if name not in _FILES:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
