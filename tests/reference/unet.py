"""`unet_*.safetensors`: output, loss and every gradient of five unlike diffusers UNets."""

import copy
import json

import torch
from diffusers import UNet2DModel

from common import FOLDER, double_precision, generator, normal, save, to_nchw, to_nhwc, to_our_layout


def config(size, image_channels, channels, blocks, attention_levels, mid_attention, head_channels, groups, **rest):
    """Every argument of UNet2DModel that matters to a DDPM, none left to a default (several are wrong for it)."""
    attends = [level in attention_levels for level in range(len(channels))]
    return dict(
        sample_size=size,
        in_channels=image_channels,
        out_channels=image_channels,
        center_input_sample=False,
        time_embedding_type="positional",
        time_embedding_dim=None,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        mid_block_type="UNetMidBlock2D",
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        block_out_channels=channels,
        layers_per_block=blocks,
        mid_block_scale_factor=1,
        downsample_padding=0,
        downsample_type="conv",
        upsample_type="conv",
        dropout=0.0,
        act_fn="silu",
        attention_head_dim=head_channels,
        norm_num_groups=groups,
        norm_eps=1e-6,
        resnet_time_scale_shift="default",
        add_attention=mid_attention,
        class_embed_type=None,
        num_class_embeds=None,
        num_train_timesteps=None,
        attn_norm_num_groups=None,
        freq_shift=1,
        flip_sin_to_cos=False,
    ) | rest


CONFIGS = {
    # Grey, one block, one head at the lowest level and in the middle.
    "grey28": config([28, 28], 1, [8, 16, 16], 1, {2}, True, None, 4),
    # Colour, two blocks, no attention anywhere.
    "colour16": config([16, 16], 3, [8, 18], 2, set(), False, None, 2),
    # Colour, 12×20 → 6×10 → 3×5, channels that are not multiples of each other, 4 and 5 heads, and where two sources
    # are concatenated (10+8 and 8+12 channels) a group that takes from both.
    "colour12x20": config([12, 20], 3, [12, 8, 10], 2, {1, 2}, True, 2, 2, attn_norm_num_groups=5),
    # Grey, attention at the highest level, the other timestep embedding.
    "grey8": config([8, 8], 1, [8, 16], 1, {0}, True, None, 4, freq_shift=0, flip_sin_to_cos=True),
    # Grey, 20×12 → 10×6 → 5×3, two heads; the timestep scales and shifts (and the middle attention has no norm).
    "grey20x12": config([20, 12], 1, [6, 8, 4], 1, {1}, True, 4, 2, resnet_time_scale_shift="scale_shift"),
}


def build(name, cfg):
    """The f64 model with random weights; no affine, bias or usually-zero layer is trivial."""
    gen = generator(f"unet_{name}")
    model = UNet2DModel(**cfg).double()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.ndim > 1:
                value = normal(gen, *p.shape, scale=p[0].numel() ** -0.5)
            else:
                norm_weight = "norm" in parameter_name and parameter_name.endswith("weight")
                value = (norm_weight + normal(gen, *p.shape, scale=0.2)).float()
            p.copy_(value)
    return model


def predict(model, x, t):
    """The model on NHWC images: [N, H, W, C], [N] → [N, H, W, C]."""
    with double_precision():  # the timestep embedding is f32 by name
        return to_nhwc(model(to_nchw(x), t).sample)


def gradients_are_right(model, x, t, target, loss):
    """Autograd against a central difference along a random direction: shows that nothing fell back to f32."""
    gen = generator("direction")
    step = 1e-6
    directions = [normal(gen, *p.shape) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions))
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(model.parameters(), directions):
                p += sign * step * d
            losses.append((predict(model, x, t) - target).square().mean())
        for p, d in zip(model.parameters(), directions):
            p += step * d
    measured = (losses[0] - losses[1]) / (2 * step)
    assert abs(measured - slope) < 1e-6 * abs(slope), (measured, slope)


def error_in_f32(model, x, t, target, output):
    """What PyTorch's own f32 run differs by, relative to the largest entry: output, and the worst gradient."""
    single = copy.deepcopy(model).float()
    single.zero_grad()
    y = predict(single, x.float(), t)
    (y - target.float()).square().mean().backward()
    worst = max(
        ((q.grad - p.grad).abs().max() / p.grad.abs().max()).item()
        for (name, p), q in zip(model.named_parameters(), single.parameters())
        if not name.endswith("to_k.bias")
    )
    return ((y - output).abs().max() / output.abs().max()).item(), worst


def make():
    for name, cfg in CONFIGS.items():
        model = build(name, cfg)
        gen = generator(f"unet_{name}_input")
        shape = (3, *cfg["sample_size"], cfg["in_channels"])
        x, target = normal(gen, *shape), normal(gen, *shape)
        t = torch.tensor([999, 0, 417])

        output = predict(model, x, t)
        loss = (output - target).square().mean()
        loss.backward()
        gradients_are_right(model, x, t, target, loss)

        errors = error_in_f32(model, x, t, target, output)
        print("  {}: PyTorch in f32 is off by {:.1e} in the output, {:.1e} in the worst gradient".format(name, *errors))

        tensors = {"x_t": x, "t": t, "target": target, "output": output, "loss": loss[None]}
        for parameter_name, p in model.named_parameters():
            # A bias on the keys shifts all scores of a row alike, which softmax does not see: its gradient is zero.
            largest = p.grad.abs().max()
            vanishes = parameter_name.endswith("to_k.bias")
            assert largest < 1e-15 if vanishes else largest > 1e-6, (parameter_name, largest)
            tensors[f"weight/{parameter_name}"] = to_our_layout(p)
            tensors[f"grad/{parameter_name}"] = to_our_layout(p.grad)
        save(f"unet_{name}.safetensors", tensors, keep_f64={"loss"})
        (FOLDER / f"unet_{name}.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | cfg, indent=2) + "\n")
