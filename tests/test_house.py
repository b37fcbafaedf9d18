"""The rules of the house: who imports whom, and what each room keeps out."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from imagen_jax import config, sharding
from imagen_jax.models import network

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imagen_jax"
MAX_LINES = 400

# What the files of a room may import, beside the room itself. At the top level lie the
# floor and the doors; a door can be run.
ARROWS = {
    "floor": set(),
    "configs": {"floor"},
    "diffusion": {"floor"},
    "models": {"floor"},
    "shapes": {"floor"},
    "text": {"models", "floor"},
    "data": {"text", "models", "floor"},
    "preparing": {"data", "shapes", "text", "models", "floor"},
    "training": {"diffusion", "models", "floor"},
    "planning": {"training", "diffusion", "models", "floor"},
    "evaluation": {"floor"},
    "api": {
        *("training", "data", "preparing", "text", "diffusion", "models", "floor"),
    },
}
ARROWS["doors"] = set(ARROWS)

EVERYWHERE = {"jax", "flax", "numpy", "scipy", "ml_dtypes"} | sys.stdlib_module_names
# Core dependencies that only some rooms may import.
ONLY_IN = {
    "optax": {"training"},
    "orbax": {"training"},
    "absl": {"doors"},
    "ml_collections": {"doors", "configs"},
    "scipy": {"shapes"},
    **dict.fromkeys(("PIL", "tqdm", "etils"), set(ARROWS) - {"diffusion", "models"}),
}
# Other dependencies that a silent room may import, when they are used.
WHEN_USED = {"safetensors": {"floor"}}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "seqio"}
TENSORFLOW_ROOMS = {"data", "preparing"}
SILENT = {"floor", "diffusion", "models", "shapes"}


def sources() -> dict[str, str]:
    """The text of every file of the package by its path in it."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {f.relative_to(PACKAGE).as_posix(): f.read_text() for f in files}


def room_of(path: str, text: str) -> str:
    """The room of a file: "models/t5.py" is in "models"."""
    first, _, rest = path.partition("/")
    if rest:
        return first
    if path == "__init__.py":  # the library's names, imported when they are used
        return "doors"
    return "doors" if 'if __name__ == "__main__":' in text else "floor"


@functools.cache
def imports(text: str) -> list[tuple[str, bool]]:
    """`(dotted name, whether it is imported with the module)` of every import."""
    found = []
    tree = ast.parse(text)
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        found += [(name, id(node) not in nested) for name in names]
    return found


def target(name: str, files: dict[str, str]) -> str:
    """The file of the package that `imagen_jax.x.y` names, or is defined in."""
    parts = name.split(".")[1:]
    for end in range(len(parts), -1, -1):
        stem = "/".join(parts[:end])
        for path in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if path in files:
                return path
    raise AssertionError(f"{name} is no file")


def needs_tensorflow(text: str) -> bool:
    """Whether TensorFlow is imported with the module."""
    return any(at_top and n.split(".")[0] in TENSORFLOW for n, at_top in imports(text))


def faults(path: str, text: str, files: dict[str, str]) -> list[str]:
    """What a file of the package imports and must not."""
    room = room_of(path, text)
    found = []
    for name, at_top in imports(text):
        package = name.split(".")[0]
        if package == "imagen_jax":
            other = target(name, files)
            if other == "__init__.py":
                continue  # its version
            allowed = {room, *ARROWS[room]}
            wrong = room_of(other, files[other]) not in allowed
            # Whoever needs TensorFlow is imported when used.
            wrong |= (
                at_top and needs_tensorflow(files[other]) and not needs_tensorflow(text)
            )
        elif package in TENSORFLOW:
            wrong = room not in TENSORFLOW_ROOMS
        elif package in ONLY_IN:
            wrong = room not in ONLY_IN[package]
        elif package in EVERYWHERE:
            wrong = False
        else:  # an optional dependency, or a relative import
            is_allowed = room not in SILENT or room in WHEN_USED.get(package, ())
            wrong = at_top or not is_allowed
        if wrong:
            found.append(f"{path} imports {name}")
    return found


def noise(path: str, text: str) -> list[str]:
    """Where a file prints or logs."""
    found = [f"{path} imports {n}" for n, _ in imports(text) if "logging" in n]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.split(".")[-1] == "print" or name == "warnings.warn":
                found.append(f"{path}:{node.lineno} calls {name}")
    return found


def test_rooms_are_known():
    assert {p.parent.name for p in PACKAGE.glob("*/*.py")} <= set(ARROWS)


def test_imports_follow_the_arrows():
    files = sources()
    found = [fault for path in files for fault in faults(path, files[path], files)]
    assert not found, "\n".join(found)


def test_imports_have_no_circle():
    files = sources()
    after = {
        path: {target(n, files) for n, _ in imports(text) if n.startswith("imagen_jax")}
        - {"__init__.py"}
        for path, text in files.items()
    }
    while leaves := {path for path, others in after.items() if not others & set(after)}:
        after = {path: others for path, others in after.items() if path not in leaves}
    assert not after, f"a circle among {sorted(after)}"


def test_pictures_are_opened_in_one_place():
    """Which formats are read, and what of errors, is decided by `images.opened`."""
    files = sources()
    assert [path for path in files if "Image.open" in files[path]] == ["images.py"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("diffusion/loss.py", "from imagen_jax.models import unet"),
        ("models/unet.py", "import imagen_jax.diffusion.gaussian"),
        ("models/unet.py", "import optax"),
        ("models/unet.py", "def f():\n    import torch"),
        ("models/unet.py", "from .blocks import Block"),
        ("training/loop.py", "from imagen_jax.data import memory"),
        ("training/loop.py", "def f():\n    import tensorflow as tf"),
        ("data/memory.py", "from imagen_jax.data import records"),
        ("data/memory.py", "from imagen_jax.preparing import job"),
        ("text/encoders.py", "import transformers"),
        ("text/encoders.py", "from imagen_jax.training import state"),
        ("batch.py", "from imagen_jax import cli"),
        ("batch.py", "from imagen_jax.models import t5"),
        ("config.py", "import ml_collections"),
        ("config.py", "import optax"),
        ("files.py", "import safetensors"),
        ("files.py", "def f():\n    import torch"),
        ("models/unet.py", "def f():\n    import safetensors"),
    ],
)
def test_a_forbidden_import_is_found(path, text):
    assert faults(path, text, sources())


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("diffusion/loss.py", "import jax.numpy as jnp\nfrom imagen_jax import batch"),
        ("training/step.py", "import optax\nfrom imagen_jax.models import network"),
        ("data/pipeline.py", "import seqio\nfrom imagen_jax.data import records"),
        ("text/encoders.py", "def f():\n    import transformers"),
        ("preparing/job.py", "def f():\n    from imagen_jax.data import pipeline"),
        ("files.py", "def f():\n    import safetensors"),
    ],
)
def test_an_allowed_import_passes(path, text):
    assert not faults(path, text, sources())


def test_pure_rooms_are_silent():
    files = sources()
    found = [
        line
        for path, text in files.items()
        if room_of(path, text) in SILENT
        for line in noise(path, text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["print(1)", "import logging", "from absl import logging"]
    + ["jax.debug.print('{}', 1)", "warnings.warn('x')"],
)
def test_noise_is_found(text):
    assert noise("models/unet.py", text)


def test_the_house_stays_small():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in files}
    long = {str(f): n for f, n in lines.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"
    package = [n for f, n in lines.items() if f.parts[0] == "imagen_jax"]
    assert len(package) <= 116
    assert sum(package) <= 17_950


# One level without attention is enough to train and sample, and compiles fast.
TINY = {
    "image_size": 8,
    "model": {
        "channels": (8,),
        "num_res_blocks": (1,),
        "self_attention": (False,),
        "text_attention": (False,),
        "text_conditioning": "mean_pool",
    },
    "text": {"length": 4, "dim": 16},
    "training": {"batch_size": 2},
    "sampler": {"steps": 2, "batch_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["unet", "efficient_unet"])
@pytest.mark.parametrize("lowres_size", [0, 4])
def test_every_logical_axis_has_a_rule(architecture, lowres_size):
    # Levels with every kind of attention: shared, cross, self and none.
    model = {
        "architecture": architecture,
        "channels": (32, 32, 32, 32),
        "num_res_blocks": (1, 1, 1, 1),
        "self_attention": (False, True, False, True),
        "text_attention": (False, True, True, False),
        "head_channels": 16,
        "dropout": 0.1,
    }
    sizes = {"image_size": 16, "lowres_size": lowres_size}
    cfg = config.from_dict({**TINY, **sizes, "model": model})
    params = jax.eval_shape(lambda key: network.init(cfg, key), jax.random.key(0))
    boxed = jax.tree.leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    assert boxed
    rules = dict(sharding.RULES)
    for path, leaf in boxed:
        name = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), f"{name} names no axes"
        assert len(leaf.names) == len(leaf.value.shape), name
        assert {axis for axis in leaf.names if axis} <= set(rules), name


WITHOUT_TENSORFLOW = """
import sys

for name in (
    "tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "clu",
    "ml_collections", "torch", "transformers",
):
    sys.modules[name] = None  # importing it fails

import importlib

for name in {modules}:
    importlib.import_module(name)

import jax
import numpy as np

from imagen_jax import batch, config, sharding
from imagen_jax.diffusion import cascade
from imagen_jax.models import network
from imagen_jax.training import state, step

cfg = config.from_dict({tiny})
mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
picture = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
text, mask = batch.pad_text([np.ones((3, 16)), np.ones((4, 16))], 4, 16)
examples = batch.Batch(image=picture, text=text, mask=mask, id=np.arange(2, dtype="i4"))
before = state.create_state(cfg, mesh)
after, metrics = step.compile_train_step(cfg, mesh)(before, examples)
assert int(after.step) == 1
assert np.isfinite(float(metrics["loss"]))
sample = cascade.compile_sampler(network.apply, cfg, mesh)
seeds = np.arange(2, dtype="u4")
own = cascade.Settings.of(cfg.sampler, 2)
pictures, _ = sample(
    after.ema, seeds, text, mask, own.guidance, own.aug_level, None
)
assert pictures.shape == (2, 8, 8, 3) and pictures.dtype == np.uint8

# Networks of every kind of layer are traced, which runs all of their code.
for architecture in ("unet", "efficient_unet"):
    values = {tiny}
    values["model"] = dict(
        architecture=architecture,
        channels=(8, 16),
        num_res_blocks=(1, 2),
        self_attention=(False, True),
        text_attention=(True, True),
        head_channels=8,
    )
    assert network.abstract_params(config.from_dict(values))
"""


@pytest.mark.slow
def test_training_and_sampling_need_no_tensorflow():
    names = ["imagen_jax.data.memory", "imagen_jax.data.manifest"]
    for path, text in sources().items():
        if room_of(path, text) in ("floor", "diffusion", "models", "training"):
            module = path.removesuffix(".py").removesuffix("__init__").rstrip("/")
            names.append(f"imagen_jax/{module}".rstrip("/").replace("/", "."))
    assert "imagen_jax.diffusion.loss" in names and "imagen_jax.batch" in names
    program = WITHOUT_TENSORFLOW.format(modules=sorted(names), tiny=TINY)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
