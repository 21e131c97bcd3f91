"""`step.safetensors`: five training steps of a small UNet, from u8 pixels to EMA."""

import json

import torch

from common import FOLDER, generator, normal, save, to_our_layout
from optimizer import moving_average
from q_sample import diffusers
from unet import CONFIGS, build, predict

STEPS, BATCH, LR, WARMUP, MAX_NORM, EMA = 5, 4, 1e-3, 2, 1.0, 0.9
CONFIG = CONFIGS["grey8"] | dict(block_out_channels=[4, 8], norm_num_groups=2)


def train(model, pixels, noise, t):
    """Yields loss, gradient norm, lr, weights and EMA after each step; the arithmetic has the model's dtype."""
    dtype = model.dtype
    scheduler = diffusers("linear", 1000)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    average = moving_average(parameters, EMA)
    for k in range(STEPS):
        x0 = pixels[k].to(dtype) / 127.5 - 1
        x_t = scheduler.add_noise(x0, noise[k].to(dtype), t[k])
        loss = (predict(model, x_t, t[k]) - noise[k].to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.param_groups[0]["lr"] = lr = LR * min((k + 1) / WARMUP, 1)
        optimizer.step()
        average.step(parameters)
        weights = [p.detach().clone() for p in parameters]
        yield loss.detach(), norm, lr, weights, [s.clone() for s in average.shadow_params]


def make():
    gen = generator("step")
    shape = (STEPS, BATCH, 8, 8, 1)
    pixels = torch.randint(0, 256, shape, generator=gen, dtype=torch.uint8)
    noise, t = normal(gen, *shape), torch.randint(0, 1000, (STEPS, BATCH), generator=gen)

    model = build("step", CONFIG)
    names = [name for name, _ in model.named_parameters()]
    tensors = {"pixels": pixels, "noise": noise, "t": t, "loss": [], "grad_norm": [], "lr": []}
    tensors |= {f"start/{name}": to_our_layout(p.clone()) for name, p in model.named_parameters()}
    single = train(build("step", CONFIG).float(), pixels, noise, t)
    for k, (step, step_f32) in enumerate(zip(train(model, pixels, noise, t), single), start=1):
        loss, norm, lr, weights, average = step
        for key, value in (("loss", loss), ("grad_norm", norm), ("lr", lr)):
            tensors[key].append(value)
        tensors |= {f"weight{k}/{name}": to_our_layout(value) for name, value in zip(names, weights)}
        tensors |= {f"ema{k}/{name}": to_our_layout(value) for name, value in zip(names, average)}
        errors = {name: (a - b).abs().max().item() for name, a, b in zip(names, weights, step_f32[3])}
        worst = max((name for name in names if not name.endswith("to_k.bias")), key=errors.get)
        k_bias = max(error for name, error in errors.items() if name.endswith("to_k.bias"))
        print(
            f"  step {k}: loss {loss:.6f}, |grad| {norm:.4f}; PyTorch in f32 is off by {abs(step_f32[0] - loss):.1e} "
            f"in the loss, {errors[worst]:.1e} in the weights ({worst}), {k_bias:.1e} in to_k.bias"
        )
    tensors |= {key: torch.tensor(tensors[key], dtype=torch.float64) for key in ("loss", "grad_norm", "lr")}
    save("step.safetensors", tensors, keep_f64={"loss", "grad_norm", "lr"})
    (FOLDER / "step.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | CONFIG, indent=2) + "\n")
