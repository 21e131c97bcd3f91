"""`q_sample.safetensors`: schedules and the forward process by denoising-diffusion-pytorch and diffusers, in f64."""

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from diffusers import DDPMScheduler

from common import double_precision, generator, normal, save, to_nchw, to_nhwc


class NoModel(torch.nn.Module):
    """GaussianDiffusion wants a network; its formulas do not."""

    channels = out_dim = 3
    self_condition = False


def ddpm_pytorch(schedule, timesteps):
    """denoising-diffusion-pytorch's process, its buffers in f64."""
    with double_precision():
        return GaussianDiffusion(NoModel(), image_size=4, timesteps=timesteps, beta_schedule=schedule)


def diffusers(schedule, timesteps):
    """diffusers' process in f64."""
    name = {"linear": "linear", "cosine": "squaredcos_cap_v2", "scaled_linear": "scaled_linear"}[schedule]
    with double_precision():
        return DDPMScheduler(num_train_timesteps=timesteps, beta_start=1e-4, beta_end=0.02, beta_schedule=name)


def make():
    gen = generator("q_sample")
    x0, noise, x_t = (normal(gen, 6, 4, 5, 3) for _ in range(3))
    t = torch.tensor([0, 1, 2, 417, 998, 999])
    tensors = {"x0": x0, "noise": noise, "x_t": x_t, "t": t}
    x0, noise, x_t = map(to_nchw, (x0, noise, x_t))

    for schedule in ("linear", "cosine"):
        process = ddpm_pytorch(schedule, 1000)
        mean, variance, log_variance = process.q_posterior(x0, x_t, t)
        images = {
            "q_sample": process.q_sample(x0, t, noise),
            "posterior_mean": mean,
            "predict_start_from_noise": process.predict_start_from_noise(x_t, t, noise),
            "predict_noise_from_start": process.predict_noise_from_start(x_t, t, x0),
            "predict_v": process.predict_v(x0, t, noise),
            "predict_start_from_v": process.predict_start_from_v(x_t, t, noise),
        }
        tensors |= {f"ddpm_pytorch/{schedule}/{key}": to_nhwc(value) for key, value in images.items()}
        tensors[f"ddpm_pytorch/{schedule}/posterior_variance"] = variance.flatten()
        tensors[f"ddpm_pytorch/{schedule}/posterior_log_variance_clipped"] = log_variance.flatten()

        scheduler = diffusers(schedule, 1000)
        tensors[f"diffusers/{schedule}/add_noise"] = to_nhwc(scheduler.add_noise(x0, noise, t))
        tensors[f"diffusers/{schedule}/get_velocity"] = to_nhwc(scheduler.get_velocity(x0, noise, t))

    for schedule, timesteps in (("linear", 1000), ("linear", 100), ("cosine", 1000), ("cosine", 100)):
        process, scheduler = ddpm_pytorch(schedule, timesteps), diffusers(schedule, timesteps)
        for library, table in (("ddpm_pytorch", process), ("diffusers", scheduler)):
            tensors[f"{library}/{schedule}_T{timesteps}/betas"] = table.betas
            tensors[f"{library}/{schedule}_T{timesteps}/alphas_cumprod"] = table.alphas_cumprod
        difference = (process.betas - scheduler.betas).abs().max().item()
        print(f"  {schedule} T={timesteps}: the libraries' betas differ by at most {difference:.1e}")
    scheduler = diffusers("scaled_linear", 1000)
    tensors["diffusers/scaled_linear_T1000/betas"] = scheduler.betas
    tensors["diffusers/scaled_linear_T1000/alphas_cumprod"] = scheduler.alphas_cumprod
    tables = {"betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"}
    save("q_sample.safetensors", tensors, keep_f64=tables)
