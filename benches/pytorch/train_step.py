"""Times a DDPM training step in PyTorch with diffusers' UNet2DModel: the peer of `ddpm-dist bench`.

    python train_step.py --model quick --threads 2 --json quick.json
    python train_step.py --config ../../configs/cifar10.toml --batch 16 --steps 5

A step is all of training except reading files: a batch of u8 pixels → q_sample → UNet → loss → backward → clipping of the
global gradient norm → Adam (fused) → EMA (foreach). Contiguous and channels_last memory are both timed, each in a process
of its own; the faster one is reported. FLOPs are 3 × the forward pass, a multiply-add counting as two.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import statistics
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

# The paper's CIFAR-10 model: also what a key missing from `[model]` means.
CIFAR10 = dict(
    image_channels=3,
    channels=[128, 256, 256, 256],
    blocks=2,
    attention_levels=[1],
    mid_attention=True,
    head_channels=0,
    groups=32,
    mid_attention_groups=None,
    norm_eps=1e-6,
    dropout=0.1,
    flip_sin_to_cos=False,
    freq_shift=1.0,
)
# Attention at 7² and in the middle. 32 groups would leave one channel to a group at 28², hence 8.
QUICK = CIFAR10 | dict(
    image_channels=1, channels=[32, 64, 64], blocks=1, attention_levels=[2], groups=8, dropout=0.0
)
PRESETS = {
    "quick": dict(model=QUICK, data=dict(size=28), train=dict(batch=32), optim=dict(lr=1e-3), ema=dict(decay=0.995)),
    "cifar10": dict(model=CIFAR10, data=dict(size=32), train=dict(batch=16), optim=dict(lr=2e-4)),
}


def unet(model, size):
    """diffusers' UNet for a `[model]` section, every argument written out."""
    attends = [level in model["attention_levels"] for level in range(len(model["channels"]))]
    return UNet2DModel(
        sample_size=size,
        in_channels=model["image_channels"],
        out_channels=model["image_channels"],
        freq_shift=model["freq_shift"],
        flip_sin_to_cos=model["flip_sin_to_cos"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        block_out_channels=model["channels"],
        layers_per_block=model["blocks"],
        downsample_padding=0,
        dropout=model["dropout"],
        attention_head_dim=model["head_channels"] or None,
        norm_num_groups=model["groups"],
        attn_norm_num_groups=model["mid_attention_groups"],
        norm_eps=model["norm_eps"],
        add_attention=model["mid_attention"],
    )


def alphas_cumprod(diffusion):
    """ᾱ of the linear schedule; another schedule costs the same."""
    bounds = diffusion.get("beta_start", 1e-4), diffusion.get("beta_end", 0.02)
    betas = torch.linspace(*bounds, diffusion.get("timesteps", 1000), dtype=torch.float64)
    return (1 - betas).cumprod(0)


def measure(config, memory_format, args):
    """Times steps in this process: a dictionary of milliseconds, FLOPs and the peak resident size."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model_config, batch = CIFAR10 | config.get("model", {}), config["train"]["batch"]
    size, channels = config["data"]["size"], model_config["image_channels"]
    height, width = (size, size) if isinstance(size, int) else size
    decay = config.get("ema", {}).get("decay", 0.9999)

    pixels = torch.randint(0, 256, (max(1024, batch), height, width, channels), dtype=torch.uint8)
    alpha_bar = alphas_cumprod(config.get("diffusion", {}))
    sqrt_alpha_bar, sqrt_one_minus = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    model = unet(model_config, (height, width)).to(memory_format=memory_format)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optim = config.get("optim", {})
    optimizer = torch.optim.Adam(parameters, lr=optim.get("lr", 2e-4), fused=True)
    max_norm = optim.get("clip", 1.0)
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16")

    def step():
        x0 = pixels[torch.randint(len(pixels), (batch,))].permute(0, 3, 1, 2).float() / 127.5 - 1
        x0 = x0.contiguous(memory_format=memory_format)
        t = torch.randint(len(alpha_bar), (batch,))
        noise = torch.randn_like(x0)
        x_t = sqrt_alpha_bar[t, None, None, None] * x0 + sqrt_one_minus[t, None, None, None] * noise
        with bf16:
            prediction = model(x_t, t).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        return loss.item()

    milliseconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        step()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(torch.zeros(1, channels, height, width), torch.zeros(1, dtype=torch.long))
    return dict(ms=milliseconds[args.warmup :], step_flops=3 * flops.get_total_flops() * batch, peak=peak)


def percentile(values, p):
    """The p-th percentile, linear between neighbours."""
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[p - 1]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", type=pathlib.Path, help="a ddpm-dist config")
    which.add_argument("--model", choices=PRESETS)
    parser.add_argument("--batch", type=int, help="instead of the config's")
    parser.add_argument("--size", type=int, help="image size, where the config leaves it to the data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--memory-format", choices=("best", "contiguous", "channels_last"), default="best")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.warmup < 0 or args.steps < 1 or args.threads < 1:
        parser.error("--warmup is 0 or more, --steps and --threads 1 or more")
    return parser, args


def main():
    parser, args = arguments()
    config = PRESETS[args.model] if args.model else tomllib.loads(args.config.read_text())
    config["data"] = config.get("data", {}) | (dict(size=args.size) if args.size else {})
    config["train"] = dict(batch=128) | config.get("train", {}) | (dict(batch=args.batch) if args.batch else {})
    if "size" not in config["data"]:
        parser.error("the config has no `data.size`: give --size")

    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if args.memory_format != "best":
        formats = {args.memory_format: formats[args.memory_format]}
    fresh = dict(max_workers=1, max_tasks_per_child=1, mp_context=multiprocessing.get_context("spawn"))
    with ProcessPoolExecutor(**fresh) as pool:
        runs = {name: pool.submit(measure, config, format, args).result() for name, format in formats.items()}
    medians = {name: statistics.median(run["ms"]) for name, run in runs.items()}
    best = min(medians, key=medians.get)
    run, median, batch = runs[best], medians[best], config["train"]["batch"]

    result = dict(
        tool="pytorch",
        version=torch.__version__,
        model=args.model or args.config.stem,
        batch=batch,
        device="cpu",
        threads=args.threads,
        dtype=args.dtype,
        memory_format=best,
        step_ms=dict(median=median, p10=percentile(run["ms"], 10), p90=percentile(run["ms"], 90)),
        images_per_second=1e3 * batch / median,
        gflops=run["step_flops"] / median / 1e6,
        peak_memory_bytes=run["peak"],
        steps=args.steps,
        step_ms_of_formats=medians,
    )
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
