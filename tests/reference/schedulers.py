"""`src/diffusion/fixtures/schedulers.json`: what diffusers' DDPM and DDIM schedulers do, in f64.

A step without clipping is linear in (x_t, network output, z), so its coefficients are read off by feeding unit vectors
to `scheduler.step`; a clipped step is kept with its inputs and result.
"""

import json
from unittest import mock

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from common import FOLDER, double_precision

OUT = FOLDER.parents[1] / "src/diffusion/fixtures/schedulers.json"

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
OBJECTIVES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}

# x_t, network output, z: the unit vectors, then values that a limit of 1 clips or does not.
PROBES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, -0.2, 0.7], [-1.4, 2.1, -0.4], [0.05, 1.6, 1.1]])


def scheduler(diffusion, sampler, clip):
    common = dict(
        num_train_timesteps=diffusion["timesteps"],
        beta_start=diffusion["beta_start"],
        beta_end=diffusion["beta_end"],
        beta_schedule=SCHEDULES[diffusion["schedule"]],
        prediction_type=OBJECTIVES[diffusion["objective"]],
        clip_sample=clip > 0,
        clip_sample_range=clip,
        timestep_spacing=sampler["spacing"],
        steps_offset=sampler["steps_offset"],
    )
    with double_precision():
        if sampler["sampler"] == "ddpm":
            made = DDPMScheduler(variance_type=diffusion["variance"], **common)
        else:
            made = DDIMScheduler(set_alpha_to_one=sampler["final_alpha_one"], **common)
    assert made.alphas_cumprod.dtype == torch.float64
    made.set_timesteps(sampler["steps"])
    return made


def step(scheduler, sampler, timestep, probes):
    """[(x̂_0, next state)] of each probe."""
    x_t, out, z = (torch.from_numpy(p.copy()).reshape(-1, 1) for p in probes.T)
    if sampler["sampler"] == "ddpm":
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: z):
            result = scheduler.step(out, timestep, x_t)
    else:
        result = scheduler.step(out, timestep, x_t, eta=sampler["eta"], variance_noise=z)
    return torch.cat([result.pred_original_sample, result.prev_sample], 1).tolist()


def case(sampler="ddpm", steps=10, spacing="leading", steps_offset=0, eta=0.0, final_alpha_one=True, **diffusion):
    diffusion = dict(
        timesteps=1000, schedule="linear", beta_start=1e-4, beta_end=0.02, objective="epsilon", variance="fixed_large"
    ) | diffusion
    sampler = dict(
        sampler=sampler,
        steps=steps,
        eta=eta,
        spacing=spacing,
        steps_offset=steps_offset,
        final_alpha_one=final_alpha_one,
    )
    free, clipped = (scheduler(diffusion, sampler, clip) for clip in (0.0, 1.0))
    timesteps = free.timesteps.tolist()
    kept = sorted({0, 1, steps // 2, steps - 2, steps - 1} & set(range(steps)))
    return dict(
        diffusion=diffusion,
        sampler=sampler,
        timesteps=timesteps,
        kept=kept,
        free=[step(free, sampler, timesteps[i], PROBES[:3]) for i in kept],
        clipped=[step(clipped, sampler, timesteps[i], PROBES[3:]) for i in kept],
    )


def digests():
    """One number for the timesteps of every K from 1 to T: digest ← (31·digest + t + 1) mod 2⁶¹−1."""
    found = []
    for timesteps in (37, 100, 1000):
        for spacing in ("leading", "trailing", "linspace"):
            made = DDIMScheduler(num_train_timesteps=timesteps, timestep_spacing=spacing)
            digest = 0
            for steps in range(1, timesteps + 1):
                made.set_timesteps(steps)
                # np.arange may yield one value too many, which diffusers turns into timestep −1.
                for t in made.timesteps.tolist()[:steps]:
                    digest = (31 * digest + t + 1) % (2**61 - 1)
            found.append(dict(timesteps=timesteps, spacing=spacing, digest=digest))
    return found


def make():
    cases = [
        case(steps=1000),
        case(steps=1000, variance="fixed_small"),
        case(steps=300, variance="fixed_small"),
        case(steps=300, objective="v"),
        case(steps=50, objective="x0", spacing="trailing", variance="fixed_small"),
        case(steps=7, spacing="linspace", schedule="cosine"),
        case(steps=20, objective="v", schedule="cosine", variance="fixed_small", timesteps=400),
        case(steps=1, spacing="trailing"),
        case("ddim", steps=50),
        case("ddim", steps=300, eta=0.3, spacing="trailing"),
        case("ddim", steps=50, eta=1.0, schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        case("ddim", steps=50, eta=0.5, final_alpha_one=False, steps_offset=1),
        case("ddim", steps=25, objective="v", schedule="cosine", spacing="trailing"),
        case("ddim", steps=10, objective="x0", spacing="linspace", final_alpha_one=False),
        case("ddim", steps=13, eta=0.7, objective="v", timesteps=100, beta_end=0.15),
    ]
    OUT.write_text(json.dumps(dict(probes=PROBES.tolist(), cases=cases, digests=digests()), separators=(",", ":")) + "\n")
    print(f"{OUT.name:32} {len(cases):5} cases {OUT.stat().st_size / 1024:10.1f} KiB")
