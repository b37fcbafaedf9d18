"""The same claims at full size, planned for a v4-512 and not run.

As in the paper's ablations (App. D): base stages of 300M parameters, batches of 2048,
400,000 steps; records with embeddings of each encoder lie in BUCKET/records-ENCODER.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from imagen_jax.config import StageConfig, from_dict
from imagen_jax.planning.program import forward_flops

_STEPS = 400_000
_CHIPS = 256
# The plan of base64 for this slice (README): seconds a step by the compiler's cycles.
# Other stages are taken to have the same rate of arithmetic.
_PLANNED_SECONDS = 0.293
# List price of a v4 chip in us-central2, on demand.
_DOLLARS_PER_CHIP_HOUR = 3.22
_T5 = tuple(f"t5_1_1_{size}" for size in ("small", "base", "large", "xl", "xxl"))
_WIDTHS = dict(zip(_T5, (512, 768, 1024, 2048, 4096)))
_WIDTHS |= {"bert_large": 1024, "clip_l14": 768}
_POOLINGS = ("cross", "attention_pool", "mean_pool")
_CLEAN = {"diffusion.lowres_augmentation": False, "sampler.aug_level": 0.0}
_SR = "configs/sr256.py:600m"
# ADM's blocks with sr256's parameters, as benchmarks/efficient_unet.py has them.
_UNET = {
    "model.architecture": "unet",
    "model.channels": "(160, 320, 640, 1280)",
    "model.num_res_blocks": "(3, 3, 3, 3)",
    "model.head_channels": 160,
    "model.skip_scale": 1.0,
}


class Run(NamedTuple):
    """A stage to train on the slice."""

    claim: str
    name: str
    config: str
    encoder: str
    changes: dict[str, Any] = {}

    def command(self, seed: int) -> str:
        """What launches it; docs: launch/README.md."""
        changes = {
            "data.records": f"gs://BUCKET/records-{self.encoder}",
            "training.steps": _STEPS,
            "training.seed": seed,
            "data.seed": seed,
            "mesh.fsdp": 32,
            "text.dim": 0,
            **self.changes,
        }
        flags = " ".join(f"'--config.{k}={v}'" for k, v in changes.items())
        name = f"{self.name.replace('_', '-')}-s{seed}"
        return (
            f"launch/tpu.sh run --name={name} --zone=us-central2-b --spot "
            f"--accelerator-type=v4-512 --config={self.config} "
            f"--workdir=gs://BUCKET/claims/{name} -- {flags}"
        )


def runs() -> Iterator[Run]:
    """All trainings; those that claims share are there once."""
    small = "configs/base64.py:300m"
    for encoder in _WIDTHS:
        yield Run("text_encoder", f"300m-{encoder}", small, encoder)
    for size in ("500m", "1b", "2b"):
        for encoder in ("t5_1_1_small", "t5_1_1_large", "t5_1_1_xxl"):
            config = f"configs/base64.py:{size}"
            yield Run("encoder_size", f"{size}-{encoder}", config, encoder)
    for kind in _POOLINGS:
        changes = {"model.text_conditioning": kind}
        yield Run("text_conditioning", f"300m-{kind}", small, "t5_1_1_xxl", changes)
    for claim, name, changes in (
        ("augmentation", "sr256", {}),
        ("augmentation", "sr256-clean", _CLEAN),
        ("efficient_unet", "sr256-unscaled", {"model.skip_scale": 1.0}),
        ("efficient_unet", "sr256-unet", _UNET),
    ):
        yield Run(claim, name, _SR, "t5_1_1_xxl", changes)


def stage(run: Run) -> StageConfig:
    """The stage of a run, as its records would fill it in."""
    import ast

    from imagen_jax.api.run import run_config

    values = run_config(run.config).to_dict()
    values["text"] |= {"dim": _WIDTHS[run.encoder]}
    for path, value in run.changes.items():
        group, name = path.split(".")
        is_tuple = isinstance(value, str) and value.startswith("(")
        values[group][name] = ast.literal_eval(value) if is_tuple else value
    return from_dict(values)


def plan(seeds: int) -> str:
    """A table of all runs with days and dollars, and their commands."""
    reference = Run("", "", "configs/base64.py:2b", "t5_1_1_xxl")
    second = _PLANNED_SECONDS / forward_flops(stage(reference))
    lines = [
        "| claim | run | TFLOP per example | days | dollars |",
        "|---|---|---|---|---|",
    ]
    days, commands = 0.0, []
    for run in runs():
        flops = forward_flops(stage(run))
        own = flops * second * _STEPS / 86_400
        days += own * seeds
        price = own * 24 * _CHIPS * _DOLLARS_PER_CHIP_HOUR
        lines.append(
            f"| {run.claim} | {run.name} | {flops / 1e12:.2f} | {own:.2f} | "
            f"{price:,.0f} |"
        )
        commands += [run.command(seed) for seed in range(seeds)]
    dollars = days * 24 * _CHIPS * _DOLLARS_PER_CHIP_HOUR
    total = (
        f"{len(commands)} trainings, {days:.1f} days on one v4-512 ({_CHIPS} chips), "
        f"about {dollars:,.0f} dollars. Planned, not run: seconds of a step are those "
        "planned for base64, by the stages' arithmetic. Guidance and thresholding need "
        "no training."
    )
    return "\n".join([*lines, "", total, "", *commands])
