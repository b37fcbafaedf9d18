"""Training steps of this library, imagen-pytorch and diffusers, in turns.

python -m benchmarks.peers --stage=base --peers_python=VENV/bin/python --json=FILE

The other Python has torch, diffusers and imagen-pytorch, without the torchvision that
pip installs with them, which does not fit torch's CPU wheel. All train with Adam on
float32 noise with text of 32 x 256: the base on 64 x 64 pixels in batches of 4, the
super-resolution stage on 256 x 256 in batches of 1. The networks have 20 to 30 million
parameters and are alike in width, depth and where they attend; they differ in
arithmetic, so compare GFLOP/s. All clip the gradients' norm and average the parameters,
as each library's trainer does, in torch by its fastest functions for lists of arrays.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PEERS = ("imagen_jax", "imagen_pytorch", "imagen_pytorch_channels_last", "diffusers")
SIZE = {"base": 64, "sr": 256}
BATCH = {"base": 4, "sr": 1}
LENGTH, DIM, THREADS = 32, 256, 2


def ours(stage):
    """`(step, facts)` of imagen_jax."""
    import jax

    from imagen_jax import benchmark, config
    from imagen_jax.planning.program import forward_flops
    from imagen_jax.sharding import make_mesh
    from imagen_jax.training.state import create_state
    from imagen_jax.training.step import jit_train_step

    model = {"dtype": "float32", "head_channels": 64}
    if stage == "base":
        model |= {
            "channels": (64, 128, 192, 256),
            "num_res_blocks": (2, 2, 2, 2),
            "self_attention": (False, False, True, True),
            "text_attention": (False, False, True, True),
        }
    else:
        model |= {
            "architecture": "efficient_unet",
            "channels": (32, 64, 128, 256),
            "num_res_blocks": (1, 2, 3, 5),
            "self_attention": (False, False, False, True),
            "text_attention": (False, False, False, True),
        }
    cfg = config.from_dict(
        {
            "image_size": SIZE[stage],
            "lowres_size": 0 if stage == "base" else 64,
            "model": model,
            "text": {"length": LENGTH, "dim": DIM},
            "training": {"batch_size": BATCH[stage]},
        }
    )
    mesh = make_mesh(cfg.mesh)
    train_step = jit_train_step(cfg, mesh)
    state, batch = create_state(cfg, mesh), benchmark.random_batch(cfg, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def step():
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)

    return step, {"parameters": parameters, "forward_flops": forward_flops(cfg)}


def torch_step(stage, model, forward):
    """`(step, facts)` of a torch network; `forward(model, x, t, text)` predicts."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(THREADS)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    size, batch = SIZE[stage], BATCH[stage]
    x, eps = torch.randn(2, batch, 3, size, size)
    t, text = torch.rand(batch), torch.randn(batch, LENGTH, DIM)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.mse_loss(forward(model, x, t, text), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-4)

    counter = FlopCounterMode(display=False)
    # Only this kernel's products are counted.
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        forward(model, x, t, text)
    return step, {
        "parameters": sum(p.numel() for p in parameters),
        "forward_flops": counter.get_total_flops() // batch,
    }


def imagen_pytorch(stage, channels_last=False):
    """`(step, facts)` of imagen-pytorch's Unet."""
    import importlib.machinery
    import types
    from unittest import mock

    import torch
    import transformers

    # It asks a server for the encoder's width when imported, and imports torchvision,
    # of which its Unet uses nothing.
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__getattr__ = mock.MagicMock()
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    t5 = transformers.T5Config(d_model=DIM)
    with mock.patch.object(transformers.T5Config, "from_pretrained", lambda *_: t5):
        from imagen_pytorch import Unet
    if stage == "base":
        values = {
            "dim": 64,
            "dim_mults": (1, 2, 3, 4),
            "num_resnet_blocks": 2,
            "layer_attns": (False, False, True, True),
            "layer_cross_attns": (False, False, True, True),
            "attn_heads": 4,
        }
    else:
        values = {
            "dim": 32,
            "dim_mults": (1, 2, 4, 8),
            "num_resnet_blocks": (1, 2, 3, 3),
            "memory_efficient": True,
            "lowres_cond": True,
            "layer_attns": (False, False, False, True),
            "layer_cross_attns": (False, False, False, True),
        }
    model = Unet(text_embed_dim=DIM, **values)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)

    def forward(model, x, t, text):
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        lowres = {}
        if stage == "sr":
            lowres = {"lowres_cond_img": x, "lowres_noise_times": t}
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        return model(x, t, text_embeds=text, text_mask=mask, **lowres)

    return torch_step(stage, model, forward)


def diffusers(stage):
    """`(step, facts)` of the U-Net of DeepFloyd IF's kind in diffusers."""
    import torch
    from diffusers import UNet2DConditionModel

    widths = (64, 128, 192, 256) if stage == "base" else (32, 64, 128, 192, 192)
    plain = len(widths) - 2
    model = UNet2DConditionModel(
        sample_size=SIZE[stage],
        in_channels=3 if stage == "base" else 6,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=2 if stage == "base" else (1, 2, 3, 3, 3),
        down_block_types=("ResnetDownsampleBlock2D",) * plain
        + ("SimpleCrossAttnDownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2
        + ("ResnetUpsampleBlock2D",) * plain,
        cross_attention_dim=DIM,
        attention_head_dim=64,
        norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )

    def forward(model, x, t, text):
        x = x if stage == "base" else torch.cat([x, x], 1)
        return model(x, 1000 * t, text).sample

    return torch_step(stage, model, forward)


def work(peer, stage):
    """A worker, which times as many steps as each line of its standard input says."""
    start = time.perf_counter()
    makers = {
        "imagen_jax": ours,
        "imagen_pytorch": imagen_pytorch,
        "imagen_pytorch_channels_last": lambda s: imagen_pytorch(s, True),
        "diffusers": diffusers,
    }
    step, facts = makers[peer](stage)
    step()
    print(json.dumps(facts | {"first_step_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def start(peer, stage, python):
    """The process of a worker."""
    command = [python, __file__, f"--worker={peer}", f"--stage={stage}"]
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )


def answer(worker):
    """The next line of JSON from a worker; other lines are passed on."""
    for line in worker.stdout:
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            print(line, end="")
    raise SystemExit(f"{worker.args} ended without an answer")


def main():
    """Compares all libraries, or is the worker of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=SIZE, required=True)
    parser.add_argument("--worker", choices=PEERS)
    parser.add_argument("--peers_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.stage)
        return
    workers, report = {}, {}
    for peer in PEERS:
        python = sys.executable if peer == "imagen_jax" else args.peers_python
        workers[peer] = start(peer, args.stage, python)
        report[peer] = answer(workers[peer])
    times = {peer: [] for peer in PEERS}
    for turn in range(args.rounds + 1):
        for peer, worker in workers.items():
            print(args.steps, file=worker.stdin, flush=True)
            # The first step of a turn finds the caches full of another's data.
            seconds = answer(worker)[1:]
            if turn:
                times[peer] += seconds
    for peer, seconds in times.items():
        median = statistics.median(seconds)
        flops = 3 * report[peer]["forward_flops"] * BATCH[args.stage] / median
        report[peer] |= {
            "step_ms": [1e3 * s for s in (median, min(seconds), max(seconds))],
            "images_per_second": BATCH[args.stage] / median,
            "gflops_per_second": flops / 1e9,
        }
        workers[peer].stdin.close()
        print(peer, json.dumps(report[peer]))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
