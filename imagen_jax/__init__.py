"""imagen-jax: train and sample Imagen (arXiv 2205.11487) cascades with JAX."""

__version__ = "0.2.0"
