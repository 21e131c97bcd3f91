"""What every fixture script shares: seeded f32 inputs, arithmetic in f64, safetensors output."""

import pathlib
import zlib
from unittest import mock

import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent


def generator(name):
    """A random generator of its own for `name`, so that adding a fixture leaves the others as they are."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def normal(gen, *shape, scale=1.0):
    """N(0, scale²) numbers that f32 holds exactly, as f64."""
    return (scale * torch.randn(shape, generator=gen, dtype=torch.float64)).float().double()


def double_precision():
    """Makes library code that asks for `torch.float32` by name compute in f64."""
    return mock.patch.object(torch, "float32", torch.float64)


def to_nchw(x):
    """[N, H, W, C] → [N, C, H, W] (also OHWI → OIHW)."""
    return x.permute(0, 3, 1, 2)


def to_nhwc(x):
    """[N, C, H, W] → [N, H, W, C] (also OIHW → OHWI)."""
    return x.permute(0, 2, 3, 1)


def to_our_layout(weight):
    """A PyTorch parameter in this project's layout: OHWI, and [O, I] where the kernel is 1×1."""
    if weight.ndim != 4:
        return weight
    return weight[:, :, 0, 0] if weight.shape[2:] == (1, 1) else to_nhwc(weight)


def save(file, tensors, keep_f64=()):
    """Writes tensors as f32, integers as they are, and the names whose last part is in `keep_f64` as f64."""
    stored = {}
    for name, value in tensors.items():
        value = torch.as_tensor(value).detach()
        if value.is_floating_point():
            value = value.to(torch.float64 if name.split("/")[-1] in keep_f64 else torch.float32)
        stored[name] = value.clone(memory_format=torch.contiguous_format)
    save_file(stored, FOLDER / file, metadata={"format": "pt"})
    print(f"{file:32} {len(stored):5} tensors {(FOLDER / file).stat().st_size / 1024:8.1f} KiB")
