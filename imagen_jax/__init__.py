"""imagen-jax: train and sample Imagen (arXiv 2205.11487) cascades with JAX.

`load_cascade` and `train` are imported when they are first used, and JAX with them.
"""

import importlib
import os
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

_ROOMS = {"load_cascade": "library", "train": "run"}


def __getattr__(name: str) -> typing.Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.api.{_ROOMS[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
