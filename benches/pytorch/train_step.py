"""Times a DDPM training step in PyTorch: the peer of `ddpm-dist bench`.

    python train_step.py --model quick --threads 2 --json quick.json
    python train_step.py --config ../../configs/cifar10.toml --batch 16 --steps 5
    python train_step.py --config ../../configs/cifar10.toml --device cuda --dtype bf16
    python train_step.py --config ../../configs/cifar10.toml --device cuda --dtype bf16 --batch 256 --sampling

A step is all of training except reading files: a batch of u8 pixels → q_sample → UNet → loss → backward → clipping of the
global gradient norm → Adam (fused) → EMA (foreach). FLOPs are 3 × the forward pass, a multiply-add counting as two.

On CPU cores the network is diffusers' UNet2DModel; contiguous and channels_last memory are both timed, each in a process of
its own, and the faster one is reported. On a GPU it is the same network in plain PyTorch (unet.py), channels_last, compiled
with max_autotune (templates and configurations of kernels are timed), the data resident on the GPU, and the whole step one
CUDA graph; times are those of CUDA events. The mode "max-autotune" would also search on from the best configuration of each
kernel, coordinate by coordinate, which takes minutes more: --coordinate-descent does so. With --sampling, a reverse step of
Algorithm 2 takes the place of the training step.
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
from torch.utils.flop_counter import FlopCounterMode

from unet import CIFAR10, UNet

# Attention at 7² and in the middle. 32 groups would leave one channel to a group at 28², hence 8.
QUICK = CIFAR10 | dict(
    image_channels=1, channels=[32, 64, 64], blocks=1, attention_levels=[2], groups=8, dropout=0.0
)
PRESETS = {
    "quick": dict(model=QUICK, data=dict(size=28), train=dict(batch=32), optim=dict(lr=1e-3), ema=dict(decay=0.995)),
    "cifar10": dict(model=CIFAR10, data=dict(size=32), train=dict(batch=16), optim=dict(lr=2e-4)),
}


def diffusers_unet(model, size):
    """diffusers' UNet for a `[model]` section, every argument written out."""
    from diffusers import UNet2DModel

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


class Training:
    """All that a training step works on, and the step, which waits for nothing on a GPU."""

    def __init__(self, model, network, config, dtype, memory_format, device):
        """`network` is what is called: `model` itself, or what it was compiled to."""
        self.network, self.memory_format, self.device = network, memory_format, device
        self.batch, self.optim = config["train"]["batch"], config.get("optim", {})
        self.decay = config.get("ema", {}).get("decay", 0.9999)
        height, width = image_size(config)
        shape = (max(1024, self.batch), height, width, model_section(config)["image_channels"])
        self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        alpha_bar = alphas_cumprod(config.get("diffusion", {}))
        self.sqrt_alpha_bar, self.sqrt_one_minus = (x.sqrt().float().to(device) for x in (alpha_bar, 1 - alpha_bar))
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        on_gpu = device == "cuda"
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.optim.get("lr", 2e-4), fused=True, capturable=on_gpu)
        # A captured step casts the weights anew each time: they have changed.
        self.bf16 = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16", cache_enabled=not on_gpu)

    def step(self):
        """The loss, on the device."""
        drawn = dict(size=(self.batch,), device=self.device)
        x0 = self.pixels[torch.randint(len(self.pixels), **drawn)].permute(0, 3, 1, 2).float() / 127.5 - 1
        x0 = x0.contiguous(memory_format=self.memory_format)
        t = torch.randint(len(self.sqrt_alpha_bar), **drawn)
        noise = torch.randn_like(x0)
        x_t = self.sqrt_alpha_bar[t, None, None, None] * x0 + self.sqrt_one_minus[t, None, None, None] * noise
        with self.bf16:
            prediction = self.network(x_t, t)
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.get("clip", 1.0), foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.decay)
        return loss


class Sampling:
    """Images on their way from noise, and a reverse step of Algorithm 2 for all of them."""

    def __init__(self, network, config, dtype, device):
        self.network = network
        height, width = image_size(config)
        channels = model_section(config)["image_channels"]
        self.x = torch.randn(config["train"]["batch"], channels, height, width, device=device)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        alpha_bar = alphas_cumprod(config.get("diffusion", {}))
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        # eq. 15 with clipping, then eq. 7 with the posterior's variance.
        rows = [(1 / alpha_bar).sqrt(), (1 / alpha_bar - 1).sqrt(), before.sqrt() * beta / (1 - alpha_bar)]
        rows += [(1 - beta).sqrt() * (1 - before) / (1 - alpha_bar), (beta * (1 - before) / (1 - alpha_bar)).sqrt()]
        self.table = torch.stack(rows).float().to(device)
        self.t = torch.full((len(self.x),), len(alpha_bar) - 1, device=device)
        self.bf16 = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False)

    @torch.no_grad()
    def step(self):
        with self.bf16:
            out = self.network(self.x, self.t)
        a, b, of_x_0, of_x_t, sigma = self.table[:, self.t, None, None, None]
        x_0 = (a * self.x - b * out.float()).clamp(-1, 1)
        self.x.copy_(of_x_0 * x_0 + of_x_t * self.x + sigma * torch.randn_like(self.x))
        self.t.sub_(1).clamp_(min=0)


def model_section(config):
    return CIFAR10 | config.get("model", {})


def image_size(config):
    size = config["data"]["size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def forward_flops(model, config):
    """FLOPs of one image's forward pass."""
    section, device = model_section(config), next(model.parameters()).device
    x = torch.zeros(1, section["image_channels"], *image_size(config), device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(x, torch.zeros(1, dtype=torch.long, device=device))
    return flops.get_total_flops()


def measure(config, memory_format, args):
    """Times steps in this process: a dictionary of milliseconds, FLOPs and the peak resident size."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = diffusers_unet(model_section(config), image_size(config)).to(memory_format=memory_format)
    training = Training(model, lambda x, t: model(x, t).sample, config, args.dtype, memory_format, "cpu")
    milliseconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        training.step().item()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flops = 3 * forward_flops(model, config) * config["train"]["batch"]
    return dict(ms=milliseconds[args.warmup :], step_flops=flops, peak=peak)


def measure_on_gpu(config, args):
    """The same on the first GPU, with its peak memory."""
    torch.manual_seed(0)
    # Plans are timed. f32 means f32, as in ddpm-dist.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = UNet(model_section(config)).to("cuda", memory_format=torch.channels_last)
    flops = forward_flops(model, config) * config["train"]["batch"]
    # The options of the mode max-autotune-no-cudagraphs: the whole step becomes a graph, and no part of it one of its own.
    options = dict(max_autotune=True, coordinate_descent_tuning=args.coordinate_descent)
    network = torch.compile(model, options=options) if args.compile else model
    if args.sampling:
        model.eval()
        work = Sampling(network, config, args.dtype, "cuda")
    else:
        work = Training(model, network, config, args.dtype, torch.channels_last, "cuda")
        flops *= 3

    # On another stream, as a capture wants it; it compiles, times plans and makes the optimiser's state.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work.step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    if not args.sampling:
        # The graph's own backward pass makes them anew in its memory.
        work.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        work.step()

    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    for _ in range(args.warmup):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in zip(events, events[1:])]
    return dict(ms=milliseconds, step_flops=flops, peak=torch.cuda.max_memory_reserved())


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sampling", action="store_true", help="a reverse step in place of a training step (cuda)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile (cuda)")
    parser.add_argument("--coordinate-descent", action="store_true", help="let torch.compile search longer (cuda)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--memory-format", choices=("best", "contiguous", "channels_last"), default="best")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.warmup < 0 or args.steps < 1 or args.threads < 1:
        parser.error("--warmup is 0 or more, --steps and --threads 1 or more")
    if args.device == "cpu" and (args.sampling or args.coordinate_descent or not args.compile):
        parser.error("--sampling, --coordinate-descent and --no-compile are for --device cuda")
    if args.coordinate_descent and not args.compile:
        parser.error("--coordinate-descent is of no use with --no-compile")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return parser, args


def on_cpu(config, args):
    """What was measured with the faster memory format, and what there is to say of both."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if args.memory_format != "best":
        formats = {args.memory_format: formats[args.memory_format]}
    fresh = dict(max_workers=1, max_tasks_per_child=1, mp_context=multiprocessing.get_context("spawn"))
    with ProcessPoolExecutor(**fresh) as pool:
        runs = {name: pool.submit(measure, config, format, args).result() for name, format in formats.items()}
    medians = {name: statistics.median(run["ms"]) for name, run in runs.items()}
    best = min(medians, key=medians.get)
    said = dict(threads=args.threads, memory_format=best, peak_memory_bytes=runs[best]["peak"])
    return runs[best], said | dict(step_ms_of_formats=medians)


def main():
    parser, args = arguments()
    config = PRESETS[args.model] if args.model else tomllib.loads(args.config.read_text())
    config["data"] = config.get("data", {}) | (dict(size=args.size) if args.size else {})
    config["train"] = dict(batch=128) | config.get("train", {}) | (dict(batch=args.batch) if args.batch else {})
    if "size" not in config["data"]:
        parser.error("the config has no `data.size`: give --size")

    if args.device == "cuda":
        run, of_device = measure_on_gpu(config, args), dict(gpu=torch.cuda.get_device_name(), compiled=args.compile)
        of_device |= dict(coordinate_descent=args.coordinate_descent)
        of_device |= dict(memory_format="channels_last", gpu_memory_bytes=run["peak"])
    else:
        run, of_device = on_cpu(config, args)
    median, batch = statistics.median(run["ms"]), config["train"]["batch"]
    result = dict(
        tool="pytorch",
        version=torch.__version__,
        what="sampling" if args.sampling else "training",
        model=args.model or args.config.stem,
        batch=batch,
        device=args.device,
        dtype=args.dtype,
        **of_device,
        step_ms=dict(median=median, p10=percentile(run["ms"], 10), p90=percentile(run["ms"], 90)),
        images_per_second=1e3 * batch / median,
        gflops=run["step_flops"] / median / 1e6,
        steps=args.steps,
    )
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
