"""One GPU: its ceilings, attention, training steps and sampling of the paper's stages.

python -m benchmarks.gpu --out=FOLDER [--seconds=300] [--tiny]

`benchmarks/gpu.sh` runs it after the tests. Parts are done in the order of their worth;
what no time is left for is left out. After each, gpu.json and gpu.md are written anew.
Weights and inputs are drawn, so only times mean anything. `--tiny` is for trying it on
a CPU.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import math
import statistics
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import config
from imagen_jax.batch import batch_spec
from imagen_jax.config import MeshConfig
from imagen_jax.diffusion.cascade import compile_sampler
from imagen_jax.diffusion.sampler import guidance_weights
from imagen_jax.errors import UserError
from imagen_jax.models import attention, network
from imagen_jax.planning.chips import CHIPS
from imagen_jax.planning.compile import (
    GIB,
    compile_step,
    sampler_inputs,
    summary,
)
from imagen_jax.planning.program import forward_flops
from imagen_jax.planning.search import guess_gib
from imagen_jax.sharding import batch_sharding, make_mesh, on_rows
from imagen_jax.training.state import abstract_state

STAGES = [("base64", "300m"), ("sr256", ""), ("sr1024", ""), ("base64", "2b")]
# Steps of a sampler that are timed; an image takes its config's.
STEPS = 4


class Values(dict):
    """What configs use of `ml_collections.ConfigDict`, where that is not installed."""

    def __init__(self, values=(), **others):
        super().__init__()
        self.update(values, **others)

    def __setitem__(self, name, value):
        super().__setitem__(name, Values(value) if type(value) is dict else value)

    __setattr__ = __setitem__

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def update(self, values=(), **others):
        """Sets values; groups become `Values` too."""
        for name, value in {**dict(values), **others}.items():
            self[name] = value

    def to_dict(self):
        """Plain dicts, of copies."""
        return {
            k: v.to_dict() if isinstance(v, Values) else copy.deepcopy(v)
            for k, v in self.items()
        }


def stage(name, variant, **training):
    """A stage's config, on one device."""
    try:
        importlib.import_module("ml_collections")
    except ImportError:
        sys.modules["ml_collections"] = types.SimpleNamespace(ConfigDict=Values)
    module = importlib.import_module(f"configs.{name}")
    values = module.get_config(*([variant] if variant else [])).to_dict()
    values["training"] |= training
    values["mesh"] = dataclasses.asdict(MeshConfig(data=1))
    return config.from_dict(values)


def filled(tree):
    """Arrays for abstract ones: small drawn numbers, or zeros of integers."""
    rng = jax.random.key(0)

    def draw(like):
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.zeros(like.shape, like.dtype)
        return 0.02 * jax.random.normal(rng, like.shape, like.dtype)

    return jax.tree.map(draw, tree)


def seconds_of(run, least=3.0):
    """The median time of a call, of three or more, until `least` seconds are over."""
    jax.block_until_ready(run())
    times = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(tiny):
    """A large product's operations a second, and bytes a second of a copy."""
    size, length = (256, 2**16) if tiny else (8192, 2**29)
    a = jnp.ones((size, size), jnp.bfloat16)
    x = jnp.zeros(length, jnp.float32)
    product, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
    return {
        "matmul_flops_per_second": 2 * size**3 / seconds_of(lambda: product(a, a), 1.0),
        "copy_bytes_per_second": 2 * x.nbytes / seconds_of(lambda: copy(x), 1.0),
    }


def attentions(tiny):
    """Milliseconds of the base's attention with its gradient, by cuDNN and by XLA."""
    rows, pixels, heads = (2, 64, 2) if tiny else (32, 1024, 8)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (rows, n, heads, 64), jnp.bfloat16)
        for i, n in enumerate((pixels, pixels + 128, pixels + 128))
    )
    mask = jnp.arange(pixels + 128)[None] < pixels + jnp.arange(1, rows + 1)[:, None]

    def xla(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])

    found = {}
    for name, way in {"xla": xla, "cudnn": attention.cudnn}.items():
        if name == "cudnn" and jax.default_backend() != "gpu":
            continue

        def loss(q, k, v, way=way):
            return way(q, k, v, mask).astype(jnp.float32).sum()

        run = jax.jit(jax.grad(loss, (0, 1, 2)))
        found[f"attention_by_{name}_ms"] = 1e3 * seconds_of(
            functools.partial(run, q, k, v), 1.0
        )
    return found


def training(name, variant, tiny, ceiling):
    """The step with the largest batch, a power of two, that fits."""
    device = jax.devices()[0]
    chip, rows = CHIPS.get(device.device_kind), 4 if tiny else 512
    limit = chip.memory_gib if chip else math.inf
    while rows:
        cfg = stage(name, variant, batch_size=rows)
        # What is known to be too large costs no compilation.
        if guess_gib(cfg, [device]) < 1.6 * limit:
            try:
                return timed_steps(cfg, device, ceiling)
            except (UserError, jax.errors.JaxRuntimeError) as error:
                print(f"{name}, {rows} images: {str(error)[:200]}", flush=True)
        rows //= 2
    raise UserError(f"{name} does not fit")


def timed_steps(cfg, device, ceiling):
    """Figures of the stage's step; an error if it does not fit."""
    mesh, rows = make_mesh(MeshConfig(), [device]), cfg.training.batch_size
    run, planned = compile_step(cfg, mesh)
    if run is None or not planned["fits"]:
        raise UserError(summary(planned))
    state = filled(abstract_state(cfg, mesh))
    batch = filled(on_rows(batch_spec(cfg), mesh))
    batch = batch.replace(mask=jnp.ones_like(batch.mask))

    def step():
        nonlocal state
        state, metrics = run(state, batch)
        return metrics

    seconds, stats = seconds_of(step), device.memory_stats()
    flops = 3 * forward_flops(cfg) * rows / seconds
    moved = planned["bytes_per_chip"] / seconds
    return {
        "batch_size": rows,
        "step_seconds": seconds,
        "images_per_second": rows / seconds,
        "share_of_matmul": flops / ceiling["matmul_flops_per_second"],
        "share_of_copy": moved / ceiling["copy_bytes_per_second"],
        "planned_step_seconds": planned["step_seconds"],
        "planned_gib": planned["hbm_gib_per_chip"],
        # Of the process until now.
        "peak_gib": stats and stats["peak_bytes_in_use"] / GIB,
        "compile_seconds": planned["compile_seconds"],
    }


def sampling(name, variant, tiny):
    """Seconds of the device for an image of this stage, from some of its steps."""
    mesh, cfg = make_mesh(MeshConfig(), jax.devices()[:1]), stage(name, variant)
    steps, rows = cfg.sampler.steps, {"sr256": 16, "sr1024": 4}.get(name, 64)
    sampler = dataclasses.replace(
        cfg.sampler, steps=STEPS, batch_size=2 if tiny else rows
    )
    cfg = dataclasses.replace(cfg, sampler=sampler)
    params = filled(abstract_state(cfg, mesh).params)
    inputs = jax.device_put(sampler_inputs(cfg, mesh), batch_sharding(mesh))
    run = compile_sampler(network.apply, cfg, mesh)
    seconds = seconds_of(lambda: run(params, *inputs))
    return {
        "batch_size": sampler.batch_size,
        "steps": steps,
        "passes_a_step": 1 + bool((np.asarray(guidance_weights(sampler)) != 1).any()),
        "seconds_per_image": seconds / STEPS * steps / sampler.batch_size,
    }


def table(found):
    """The figures in Markdown."""
    lines = [f"{found['device']}, jax {jax.__version__}, {found['date']}", ""]
    lines += [f"- {k}: {v:.4g}" for k, v in found.get("ceilings", {}).items()]
    lines += [f"- {k}: {v:.4g}" for k, v in found.get("attention", {}).items()]
    names = ["batch_size", "step_seconds", "images_per_second", "share_of_matmul"]
    names += ["share_of_copy", "planned_step_seconds", "planned_gib", "peak_gib"]
    lines += ["", f"| training | {' | '.join(names)} |", "|---" * 9 + "|"]
    for name, row in found.get("training", {}).items():
        cells = [f"{row[n]:.4g}" if row.get(n) is not None else "" for n in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| sampling | seconds per image |", "|---|---|"]
    for name, row in found.get("sampling", {}).items():
        lines.append(f"| {name} | {row['seconds_per_image']:.4g} |")
    if images := found.get("cascade_images_per_second"):
        lines.append(f"| cascade | {1 / images:.4g}: {images:.4g} images a second |")
    lines += [f"- not done: {part}" for part in found["not_done"]]
    return "\n".join(lines) + "\n"


def main():
    """Measures part after part, while time is left."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    end, longest = time.monotonic() + args.seconds, 0.0
    found = {"device": jax.devices()[0].device_kind, "date": time.strftime("%F")}
    found |= {"training": {}, "sampling": {}, "not_done": []}
    stages = [(n, "tiny") for n in ("base64", "sr256", "sr1024")]
    stages = stages if args.tiny else STAGES
    parts = [("ceilings", lambda: ceilings(args.tiny))]
    parts += [("attention", lambda: attentions(args.tiny))]
    for what, run in (("training", training), ("sampling", sampling)):
        for name, variant in stages:
            if (what, variant) != ("sampling", "2b"):
                parts.append((what, name, variant, run))
    for part in parts:
        what, label = part[0], " ".join(str(p) for p in part[:3] if isinstance(p, str))
        if longest > end - time.monotonic():
            found["not_done"].append(f"{label}: no time")
            continue
        start = time.monotonic()
        try:
            if len(part) == 2:
                found[what] = part[1]()
            else:
                extra = (found["ceilings"],) if what == "training" else ()
                row = part[3](part[1], part[2], args.tiny, *extra)
                found[what][f"{part[1]}:{part[2]}".rstrip(":")] = row
        # The others are still worth having.
        except Exception as error:
            found["not_done"].append(f"{label}: {' '.join(str(error).split())[:300]}")
        longest = max(longest, time.monotonic() - start)
        jax.clear_caches()
        each = [row["seconds_per_image"] for row in found["sampling"].values()]
        if len(each) == 3:
            found["cascade_images_per_second"] = 1 / math.fsum(each)
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1))
        (args.out / "gpu.md").write_text(table(found))
        print(f"{label}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
