"""The DDPM UNet in plain PyTorch, with the names and the arithmetic of diffusers' UNet2DModel: what `torch.compile` gets as the peer on a GPU,
where nothing but PyTorch need be installed.

    python unet.py        # checks it against diffusers, which this alone takes
"""

import math

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

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


class Resnet(nn.Module):
    def __init__(self, model, channels, out):
        super().__init__()
        groups, eps = model["groups"], model["norm_eps"]
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * model["channels"][0], out)
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.dropout = nn.Dropout(model["dropout"])
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(silu(self.norm1(x))) + self.time_emb_proj(silu(temb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(self.dropout(silu(self.norm2(h))))


class Attention(nn.Module):
    def __init__(self, model, channels, groups):
        super().__init__()
        self.heads = channels // (model["head_channels"] or channels)
        self.group_norm = nn.GroupNorm(groups, channels, model["norm_eps"])
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.group_norm(x).reshape(n, c, h * w).transpose(1, 2)
        by_head = lambda linear: linear(tokens).reshape(n, h * w, self.heads, -1).transpose(1, 2)
        heads = scaled_dot_product_attention(by_head(self.to_q), by_head(self.to_k), by_head(self.to_v))
        return x + self.to_out[0](heads.transpose(1, 2).reshape(n, h * w, c)).transpose(1, 2).reshape(n, c, h, w)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(interpolate(x, scale_factor=2, mode="nearest"))


class Block(nn.Module):
    """Residual blocks, with attention after each where the level has it."""

    def __init__(self, model, sizes, out, attends, groups=None):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(model, channels, out) for channels in sizes)
        if attends:
            number = len(sizes) - (groups is not None)
            self.attentions = nn.ModuleList(Attention(model, out, groups or model["groups"]) for _ in range(number))

    def layer(self, i, x, temb):
        x = self.resnets[i](x, temb)
        return self.attentions[i](x) if hasattr(self, "attentions") and i < len(self.attentions) else x


class UNet(nn.Module):
    """ε_θ(x_t, t) for a `[model]` section: x [N, C, H, W] and t [N] to [N, C, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        channels, blocks, image = model["channels"], model["blocks"], model["image_channels"]
        levels, first, last = len(channels), channels[0], channels[-1]
        self.time_embedding = nn.ModuleDict(dict(linear_1=nn.Linear(first, 4 * first), linear_2=nn.Linear(4 * first, 4 * first)))
        self.conv_in = nn.Conv2d(image, first, 3, padding=1)
        attends = [level in model["attention_levels"] for level in range(levels)]

        self.down_blocks, skips, at = nn.ModuleList(), [first], first
        for level, out in enumerate(channels):
            block = Block(model, [at] + [out] * (blocks - 1), out, attends[level])
            skips, at = skips + [out] * blocks, out
            if level + 1 < levels:
                block.downsamplers, skips = nn.ModuleList([Down(out)]), skips + [out]
            self.down_blocks.append(block)
        groups = model["mid_attention_groups"] or model["groups"]
        self.mid_block = Block(model, [last, last], last, model["mid_attention"], groups)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            out = channels[level]
            sizes = [(at if i == 0 else out) + skips.pop() for i in range(blocks + 1)]
            block, at = Block(model, sizes, out, attends[level]), out
            if level > 0:
                block.upsamplers = nn.ModuleList([Up(out)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(model["groups"], first, model["norm_eps"])
        self.conv_out = nn.Conv2d(first, image, 3, padding=1)

    def timestep(self, t):
        half = self.model["channels"][0] // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(exponents / (half - self.model["freq_shift"]))
        parts = [angles.cos(), angles.sin()] if self.model["flip_sin_to_cos"] else [angles.sin(), angles.cos()]
        embedding = torch.cat(parts, 1).to(self.conv_in.weight.dtype)
        return self.time_embedding["linear_2"](silu(self.time_embedding["linear_1"](embedding)))

    def forward(self, x, t):
        temb, x = self.timestep(t), self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, temb)
                skips.append(x)
            for down in getattr(block, "downsamplers", []):
                x = down(x)
                skips.append(x)
        for i in range(2):
            x = self.mid_block.layer(i, x, temb)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], 1), temb)
            for up in getattr(block, "upsamplers", []):
                x = up(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


def main():
    from train_step import diffusers_unet

    torch.manual_seed(0)
    small = dict(channels=[32, 64, 64], groups=8, dropout=0.0)
    for name, change in {
        "attention inside": dict(),
        "heads, no attention in the middle": dict(head_channels=16, mid_attention=False, flip_sin_to_cos=True, freq_shift=0.0),
        "one block, grey, other groups in the middle": dict(image_channels=1, blocks=1, attention_levels=[2], mid_attention_groups=16),
    }.items():
        model = CIFAR10 | small | change
        theirs, ours = diffusers_unet(model, (16, 16)).double(), UNet(model).double()
        ours.load_state_dict(theirs.state_dict())
        x, t = torch.randn(2, model["image_channels"], 16, 16, dtype=torch.float64), torch.tensor([3, 950])
        # Both compute the timestep's embedding in f32, in the same order.
        error = (ours(x, t) - theirs(x, t).sample).abs().max().item()
        assert error < 1e-12, f"{name}: {error}"
        print(f"{name}: equal to diffusers', {sum(p.numel() for p in ours.parameters())} parameters")


if __name__ == "__main__":
    main()
