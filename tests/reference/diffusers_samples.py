"""`diffusers_samples.*`: images that diffusers itself samples from the network of `diffusers_dir/f32`, for tests/sample.rs.

Each case is a scheduler_config.json, a number of steps and the images [2, 8, 8, 3] that x_T = `noise` becomes by diffusers' own scheduler
and the loop of its DDIMPipeline (η = 0), in f64. `f32` is how far f32 arithmetic in PyTorch ends from that, the worst of a few x_T that
differ in the last bit: what rounding alone can do to this trajectory.

    python diffusers_samples.py noise DIR NOISE.npy                  # x_T for a directory that `ddpm-dist export` wrote
    python diffusers_samples.py check DIR NOISE.npy IMAGES.npy K     # its images from that x_T by K steps of DDIM, against diffusers
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from common import FOLDER, double_precision, generator, normal, save, to_nchw, to_nhwc

BETAS = dict(beta_start=1e-4, beta_end=0.02)

# name: (scheduler, steps)
CASES = {
    "leading": (DDIMScheduler(**BETAS), 10),
    "leading_all": (DDIMScheduler(num_train_timesteps=30, beta_start=1e-3, beta_end=0.3), 30),
    "leading_offset": (DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False), 10),
    # ⌊T/K⌋ is not the distance between the timesteps visited.
    "leading_uneven": (DDIMScheduler(**BETAS), 7),
    "trailing": (DDIMScheduler(**BETAS, timestep_spacing="trailing"), 10),
    "trailing_uneven": (DDIMScheduler(**BETAS, timestep_spacing="trailing"), 7),
    "linspace": (DDIMScheduler(**BETAS, timestep_spacing="linspace"), 10),
    "linspace_not_one": (DDIMScheduler(**BETAS, timestep_spacing="linspace", set_alpha_to_one=False), 7),
    "clip_half": (DDIMScheduler(**BETAS, clip_sample_range=0.5), 10),
    "unclipped_v": (DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction"), 10),
    "unclipped_x0": (DDIMScheduler(**BETAS, clip_sample=False, prediction_type="sample", timestep_spacing="trailing"), 10),
    "v_cosine": (DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"), 10),
    "scaled_linear": (DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), 10),
    # One step of Algorithm 2 draws no noise.
    "ddpm_one_step": (DDPMScheduler(**BETAS, timestep_spacing="trailing"), 1),
    # A DDPM directory sampled by DDIM, as `DDIMScheduler.from_config` does it.
    "ddpm_by_ddim": (DDPMScheduler(**BETAS, variance_type="fixed_large"), 10),
}


def config_of(scheduler):
    values = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return dict(_class_name=type(scheduler).__name__, **values)


def sample(unet, scheduler, steps, x):
    """diffusers' loop: x_T [N, C, H, W] → x_0, in the dtype of x."""
    made = type(scheduler) if steps == 1 else DDIMScheduler
    if x.dtype == torch.float64:
        with double_precision():  # schedulers and timestep embedding ask for f32 by name
            return loop(unet, made.from_config(scheduler.config), steps, x)
    return loop(unet, made.from_config(scheduler.config), steps, x)


def loop(unet, scheduler, steps, x):
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == steps and min(timesteps) >= 0, timesteps
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


def exact_and_rounding(directory, scheduler, steps, noise):
    """x_0 [N, C, H, W] in f64, and how far f32 ends from it."""
    single, double = UNet2DModel.from_pretrained(directory).eval(), UNet2DModel.from_pretrained(directory).eval().double()
    exact, gen, deviation = sample(double, scheduler, steps, noise), torch.Generator().manual_seed(0), 0.0
    for _ in range(8):
        near = noise.float() * (1 + torch.randint(-1, 2, noise.shape, generator=gen) * 2**-23)
        deviation = max(deviation, (sample(single, scheduler, steps, near).double() - exact).abs().max().item())
    return exact, deviation


def make():
    noise = to_nchw(normal(generator("diffusers_samples"), 2, 8, 8, 3))
    tensors, cases = {"noise": to_nhwc(noise)}, []
    for name, (scheduler, steps) in CASES.items():
        exact, deviation = exact_and_rounding(Path(FOLDER) / "diffusers_dir/f32/unet", scheduler, steps, noise)
        print(f"{name:18} largest pixel {exact.abs().max():8.3f}, f32 is off by {deviation:.2e}")
        tensors[name] = to_nhwc(exact)
        cases.append(dict(name=name, steps=steps, f32=deviation, scheduler=config_of(scheduler)))
    save("diffusers_samples.safetensors", tensors)
    (FOLDER / "diffusers_samples.json").write_text(json.dumps(cases, indent=1) + "\n")


def noise_for(directory, file):
    config = DDPMPipeline.from_pretrained(directory).unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    np.save(file, normal(generator("noise"), 2, height, width, config.in_channels).float().numpy())


def check(directory, noise, images, steps):
    scheduler = DDPMPipeline.from_pretrained(directory).scheduler
    noise = to_nchw(torch.from_numpy(np.load(noise)).double())
    exact, deviation = exact_and_rounding(Path(directory) / "unet", scheduler, int(steps), noise)
    off = (to_nchw(torch.from_numpy(np.load(images)).double()) - exact).abs().max().item()
    print(f"off by {off:.2e}; PyTorch in f32: {deviation:.2e}")
    assert exact.std() > 0.01, "images of one colour show nothing"
    assert off <= 8 * deviation, "these are not diffusers' images"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dict(noise=noise_for, check=check)[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:] else make()
