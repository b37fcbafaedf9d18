"""imagen-jax: train and sample Imagen (arXiv 2205.11487) cascades with JAX."""

import os
import warnings

__version__ = "0.2.0"

# JAX warns of the settings of TPUs as it is imported, whether or not it may use one.
if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
    warnings.filterwarnings("ignore", module=r"jax\._src\.cloud_tpu_init")
