"""The rules of the house: who imports whom, and what each room keeps out.

`doors -> evaluation, data, training -> diffusion | models -> floor`
"""

import ast
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

# The other files of the package's top are floor.
DOORS = {
    "train",
    "prepare",
    "sample",
    "evaluate",
    "plan",
    "benchmark",
    "demo",
    "export",
    "metrics",
}
DOORS |= {"cli", "compiled", "processes", "sweep", "timings", "trained"}
DOORS |= {"planned", "printed", "settings"}
ROOMS = ("diffusion", "models", "training", "data", "evaluation")
ARROWS = {
    "floor": {"floor"},
    "diffusion": {"floor", "diffusion"},
    "models": {"floor", "models"},
    "training": {"floor", "diffusion", "models", "training"},
    "data": {"floor", "models", "data"},
    "evaluation": {"floor", "diffusion", "models", "evaluation"},
    "doors": {"floor", *ROOMS, "doors"},
}

EVERYWHERE = {"jax", "flax", "numpy", "ml_dtypes"}
# Of the core dependencies these are for all but the maths and the networks.
NOT_PURE = {"PIL", "tqdm", "etils"}
ONE_ROOM = {
    "optax": "training",
    "orbax": "training",
    "absl": "doors",
    "ml_collections": "doors",
}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
TENSORFLOW_FILES = {
    "data/preprocess.py",
    "data/tasks.py",
    "data/pipeline.py",
    "data/tfds_source.py",
    "data/tfds_records.py",
}
# Hides the accelerators from it before the others are imported.
STARTS_TENSORFLOW = "data/start_tensorflow.py"

SILENT_ROOMS = ("floor", "diffusion", "models")
SILENT_FILES = {
    "training/step.py",
    "training/state.py",
    "training/optimizer.py",
    "data/shapes.py",
    "data/judge.py",
}


def sources():
    """Every file of the package, as its path in it and its text."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [(f.relative_to(PACKAGE).as_posix(), f.read_text()) for f in files]


def room_of(path: str) -> str:
    """Of a file's path in the package: "models/t5.py" is in "models"."""
    first, _, rest = path.partition("/")
    if rest:
        return first
    return "doors" if first.removesuffix(".py") in DOORS else "floor"


def imports(text: str):
    """`(dotted name, whether it is imported with the module)` of every import."""
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
        for name in names:
            yield name, id(node) not in nested


def import_faults(path: str, text: str) -> list[str]:
    """What a file of the package imports and must not."""
    faults = []
    room = room_of(path)
    for name, at_top in imports(text):
        parts = name.split(".")
        if name == "imagen_jax":
            continue  # its version
        if parts[0] == "imagen_jax":
            target = "/".join(parts[1:3])
            target = target if parts[1] in ROOMS else parts[1]
            wrong = room_of(target) not in ARROWS[room]
            # They need TensorFlow, so nobody may need them just to be imported.
            is_tensorflow = f"{target}.py" in TENSORFLOW_FILES
            wrong |= is_tensorflow and at_top and path not in TENSORFLOW_FILES
        elif parts[0] in TENSORFLOW:
            wrong = path not in TENSORFLOW_FILES
            wrong &= at_top or path != STARTS_TENSORFLOW
        elif parts[0] in ONE_ROOM:
            wrong = room != ONE_ROOM[parts[0]]
        elif parts[0] in NOT_PURE:
            wrong = room in ("diffusion", "models")
        elif parts[0] in EVERYWHERE or parts[0] in sys.stdlib_module_names:
            wrong = False
        else:  # an optional dependency, or a relative import
            wrong = at_top or room in ("floor", "diffusion", "models")
        if wrong:
            faults.append(f"{path} imports {name}")
    return faults


def noise(path: str, text: str) -> list[str]:
    """Where a file prints or logs."""
    found = [f"{path} imports {n}" for n, _ in imports(text) if "logging" in n]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.split(".")[-1] == "print" or name.startswith("warnings."):
                found.append(f"{path}:{node.lineno} calls {name}")
    return found


def test_rooms_are_known():
    found = {p.parent.name for p in PACKAGE.glob("*/*.py")}
    assert found <= set(ROOMS)
    assert {"diffusion", "models", "training", "data"} <= found


def test_imports_follow_the_arrows():
    faults = [fault for path, text in sources() for fault in import_faults(path, text)]
    assert not faults, "\n".join(faults)


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
        ("data/memory.py", "from imagen_jax.data import pipeline"),
        ("data/text.py", "import transformers"),
        ("data/text.py", "from imagen_jax.training import state"),
        ("batch.py", "from imagen_jax import cli"),
        ("batch.py", "from imagen_jax.models import t5"),
        ("train.py", "import optax"),
        ("config.py", "import ml_collections"),
        ("evaluation/fid.py", "import torch"),
    ],
)
def test_a_forbidden_import_is_found(path, text):
    assert import_faults(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("diffusion/loss.py", "import jax.numpy as jnp\nfrom imagen_jax import batch"),
        (
            "training/step.py",
            "import optax\nfrom imagen_jax.models.network import init",
        ),
        ("data/pipeline.py", "import seqio\nfrom imagen_jax.data import tasks"),
        ("data/text.py", "def f():\n    import transformers"),
        ("train.py", "from absl import flags\nfrom imagen_jax.data import memory"),
        ("train.py", "def f():\n    from imagen_jax.data import pipeline"),
        ("evaluation/fid.py", "def f():\n    import torch"),
    ],
)
def test_an_allowed_import_passes(path, text):
    assert not import_faults(path, text)


def test_pure_rooms_are_silent():
    silent = [
        (path, text)
        for path, text in sources()
        if room_of(path) in SILENT_ROOMS or path in SILENT_FILES
    ]
    assert {path for path, _ in silent} >= SILENT_FILES
    found = [line for path, text in silent for line in noise(path, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["print(1)", "import logging", "from absl import logging"]
    + ["jax.debug.print('{}', 1)", "warnings.warn('x')"],
)
def test_noise_is_found(text):
    assert noise("models/unet.py", text)


def test_files_stay_small():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in files}
    long = {str(f): n for f, n in lines.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


# One level is enough to train and sample, and compiles in half the time.
TINY = {
    "image_size": 8,
    "model": {
        "channels": (32,),
        "num_res_blocks": (1,),
        "self_attention": (True,),
        "text_attention": (True,),
        "head_channels": 32,
    },
    "text": {"length": 4, "dim": 16},
    "training": {"batch_size": 2},
    "sampler": {"steps": 2, "batch_size": 2},
}


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
"""


@pytest.mark.slow
def test_training_and_sampling_need_no_tensorflow():
    names = ["imagen_jax.data.memory", "imagen_jax.data.manifest"]
    for path, _ in sources():
        if room_of(path) in ("floor", "diffusion", "models", "training"):
            module = path.removesuffix(".py").removesuffix("__init__").rstrip("/")
            names.append(f"imagen_jax/{module}".rstrip("/").replace("/", "."))
    assert "imagen_jax.diffusion.loss" in names and "imagen_jax.batch" in names
    program = WITHOUT_TENSORFLOW.format(modules=sorted(names), tiny=TINY)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
