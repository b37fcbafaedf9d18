"""Records diffusers.npz: steps of diffusers' DDPM, DDIM and DPM-Solver++ schedulers.

Run with `pip install torch diffusers` (recorded with torch 2.13, diffusers 0.42):
python tests/references/make_diffusers.py
"""

import pathlib

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

# Sampling in 20 steps of 50, and in 1000 steps of 1; the last step's target, which
# is free of noise, is left out.
TIMESTEPS = {50: (950, 500, 50), 1: (999, 500, 1)}


def make(scheduler, prediction, stride, **options):
    """A scheduler in float64 on its own table."""
    made = scheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        **options,
    )
    made.set_timesteps(1000 // stride)
    made.alphas_cumprod = made.alphas_cumprod.double()
    return made


rng = np.random.default_rng(0)
z, output = (torch.from_numpy(a) for a in rng.normal(size=(2, 1, 3, 4, 4)))
noise = torch.randn(z.shape, generator=torch.manual_seed(0), dtype=z.dtype)
arrays = {"z": z, "output": output, "noise": noise}
for prediction in ("eps", "v"):
    for stride, timesteps in TIMESTEPS.items():
        for t in timesteps:
            name = f"{prediction}_{t}_{t - stride}"
            for variance in ("fixed_small", "fixed_large"):
                ddpm = make(DDPMScheduler, prediction, stride, variance_type=variance)
                step = ddpm.step(output, t, z, generator=torch.manual_seed(0))
                arrays[f"ddpm_{variance}_{name}"] = step.prev_sample
            step = make(DDIMScheduler, prediction, stride).step(output, t, z)
            arrays[f"ddim_{name}"] = step.prev_sample
            arrays[f"x0_{name}"] = step.pred_original_sample
# A whole run of eight steps, with answers that do not depend on z.
answers = torch.from_numpy(rng.normal(size=(8, *z.shape)))
arrays["answers"] = answers
for prediction in ("eps", "v"):
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
    )
    solver.set_timesteps(8)
    now, run = z, []
    for t, answer in zip(solver.timesteps, answers):
        now = solver.step(answer, t, now).prev_sample
        run.append(now)
    arrays[f"dpmpp_{prediction}"] = torch.stack(run)
    arrays["dpmpp_sigma_over_alpha"] = solver.sigmas
arrays["alphas_cumprod"] = make(DDPMScheduler, "eps", 1).alphas_cumprod

np.savez_compressed(
    pathlib.Path(__file__).with_name("diffusers.npz"),
    # Channels last, as everywhere in this project.
    **{
        name: (a.movedim(-3, -1) if a.ndim > 3 else a).numpy()
        for name, a in arrays.items()
    },
)
