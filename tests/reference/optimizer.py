"""`optimizer.safetensors`: Adam, AdamW, warm-up, decay, clipping and EMA over ten steps of given gradients.

Step k = 1 … 10 is `clip_grad_norm_` → lr of step k → optimiser → EMA, as in a training loop.
"""

import torch
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from common import generator, normal, save

STEPS, PARAMETERS = 10, 1000


def multipliers(schedule, count, **arguments):
    """What a diffusers schedule multiplies the learning rate by at steps 0 … count − 1."""
    scheduler = schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), **arguments)
    return torch.tensor([scheduler.lr_lambdas[0](k) for k in range(count)], dtype=torch.float64)


def moving_average(parameters, decay, warmup=False):
    """diffusers' EMA; without warm-up it believes to be past it, as its first update otherwise copies the weights."""
    average = EMAModel(parameters, decay=decay)
    average.optimization_step = 0 if warmup else 10**12
    return average


def run(optimizer_class, start, gradients, lr, max_norm, ema, **arguments):
    """Ten steps; returns the state after each, f64."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = optimizer_class([parameter], betas=(0.9, 0.999), eps=1e-8, **arguments)
    average = moving_average([parameter], **ema)
    history = {key: [] for key in ("grad_norm", "clip_coef", "ema_decay", "param", "exp_avg", "exp_avg_sq", "ema")}
    for gradient, step_lr in zip(gradients, lr):
        parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        optimizer.param_groups[0]["lr"] = step_lr.item()
        optimizer.step()
        average.step([parameter])
        state = optimizer.state[parameter]
        history["grad_norm"].append(norm)
        history["clip_coef"].append((max_norm / (norm + 1e-6)).clamp(max=1.0))
        history["ema_decay"].append(torch.tensor(average.cur_decay_value, dtype=torch.float64))
        history["param"].append(parameter.detach().clone())
        history["exp_avg"].append(state["exp_avg"].clone())
        history["exp_avg_sq"].append(state["exp_avg_sq"].clone())
        history["ema"].append(average.shadow_params[0].clone())
    return {key: torch.stack(values) for key, values in history.items()}


def make():
    gen = generator("optimizer")
    start = normal(gen, PARAMETERS)
    # Norms from 0.003 to 194 on both sides of the clip at 1, entries of unlike sizes, a few zeros (only eps divides).
    scale = torch.tensor([1e-4, 1, 3e-3, 10, 0.02, 0.3, 1e-3, 0.04, 0.01, 2], dtype=torch.float64)
    spread = 10 ** normal(gen, PARAMETERS)
    spread /= spread.square().mean().sqrt()
    gradients = (scale[:, None] * spread * normal(gen, STEPS, PARAMETERS)).float().double()
    gradients[:, ::97] = 0

    warmup, decay_steps = 4, 10
    constant = multipliers(get_constant_schedule_with_warmup, STEPS + 1, num_warmup_steps=warmup)
    cosine = multipliers(
        get_cosine_schedule_with_warmup, STEPS + 1, num_warmup_steps=warmup, num_training_steps=decay_steps
    )
    tensors = {"start": start, "grads": gradients, "constant_warmup4": constant, "cosine_warmup4_total10": cosine}
    runs = {
        "adam": (torch.optim.Adam, 2e-3 * constant[1:], 1.0, dict(decay=0.9), {}),
        "adam_unclipped": (torch.optim.Adam, 1e-3 * torch.ones_like(cosine[1:]), 1e9, dict(decay=0.9999), {}),
        "adamw": (torch.optim.AdamW, 5e-3 * cosine[1:], 1.0, dict(decay=0.4, warmup=True), dict(weight_decay=0.1)),
    }
    for name, (optimizer_class, lr, max_norm, ema, arguments) in runs.items():
        history = run(optimizer_class, start, gradients, lr, max_norm, ema, **arguments)
        tensors |= {f"{name}/{key}": value for key, value in history.items()}
        tensors[f"{name}/lr"] = lr.double()
    scalars = {"constant_warmup4", "cosine_warmup4_total10", "lr", "grad_norm", "clip_coef", "ema_decay"}
    save("optimizer.safetensors", tensors, keep_f64=scalars)
