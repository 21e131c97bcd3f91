"""`ops.safetensors` and `cases.json`: every op forward and backward, in NHWC / OHWI, on awkward sizes."""

import json

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding

from common import FOLDER, double_precision, generator, normal, save, to_nchw, to_nhwc


class Fixture:
    """Collects tensors `case/name` and the attributes of each case."""

    def __init__(self):
        self.tensors, self.cases = {}, {}

    def case(self, name, attributes, **tensors):
        self.cases[name] = attributes
        self.tensors |= {f"{name}/{key}": value for key, value in tensors.items()}

    def op(self, name, attributes, function, **inputs):
        """Runs y = function(inputs) and, for a random dy, the gradient d‹input› of every input."""
        leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        y = function(**leaves)
        dy = normal(generator(f"{name}/dy"), *y.shape)
        y.backward(dy)
        gradients = {f"d{key}": leaf.grad for key, leaf in leaves.items()}
        self.case(name, attributes, **inputs, y=y, dy=dy, **gradients)


def convolutions(fixture):
    def stride_1(x, w, b):
        return to_nhwc(F.conv2d(to_nchw(x), to_nchw(w), b, padding=1))

    def stride_2(x, w, b):
        return to_nhwc(F.conv2d(F.pad(to_nchw(x), (0, 1, 0, 1)), to_nchw(w), b, stride=2))

    for name, stride, n, h, w, c_in, c_out in (
        ("conv3x3_s1_odd", 1, 2, 5, 7, 3, 20),
        ("conv3x3_s1_wide", 1, 2, 5, 7, 33, 17),
        ("conv3x3_s1_out", 1, 1, 9, 6, 20, 1),
        ("conv3x3_s1_pixel", 1, 3, 1, 1, 5, 6),
        ("conv3x3_s2_flat", 2, 2, 8, 6, 5, 7),
        ("conv3x3_s2_square", 2, 1, 28, 28, 4, 6),
        ("conv3x3_s2_pixel", 2, 2, 2, 2, 9, 5),
    ):
        gen = generator(name)
        fixture.op(
            name,
            {"op": "conv3x3", "stride": stride, "padding": [[1, 1], [1, 1]] if stride == 1 else [[0, 1], [0, 1]]},
            stride_1 if stride == 1 else stride_2,
            x=normal(gen, n, h, w, c_in),
            w=normal(gen, c_out, 3, 3, c_in, scale=(9 * c_in) ** -0.5),
            b=normal(gen, c_out),
        )


def linears(fixture):
    def two_sources(x1, x2, w, b):
        return F.linear(torch.cat([x1, x2], dim=-1), w, b)

    for name, shape, c_out in (("conv1x1", (2, 5, 7, 33), 17), ("linear", (3, 20), 37), ("linear_row", (1, 16), 64)):
        gen = generator(name)
        fixture.op(
            name,
            {"op": "linear"},
            lambda x, w, b: F.linear(x, w, b),
            x=normal(gen, *shape),
            w=normal(gen, c_out, shape[-1], scale=shape[-1] ** -0.5),
            b=normal(gen, c_out),
        )
    gen = generator("conv1x1_two_sources")
    fixture.op(
        "conv1x1_two_sources",
        {"op": "linear", "sources": 2},
        two_sources,
        x1=normal(gen, 2, 5, 7, 12),
        x2=normal(gen, 2, 5, 7, 20),
        w=normal(gen, 17, 32, scale=32**-0.5),
        b=normal(gen, 17),
    )


def group_norms(fixture):
    eps = 1e-6

    def function(groups, silu, scales):
        def group_norm(w, b, temb=None, **sources):
            x = to_nchw(torch.cat(list(sources.values()), dim=-1))
            if temb is not None and not scales:
                x = x + temb[:, :, None, None]
            y = F.group_norm(x, groups, w, b, eps)
            if scales:
                scale, shift = temb[:, :, None, None].chunk(2, dim=1)
                y = y * (1 + scale) + shift
            return to_nhwc(F.silu(y) if silu else y)

        return group_norm

    for name, channels, groups, silu, temb, mean in (
        ("group_norm", (20,), 4, False, False, 0),
        ("group_norm_silu", (20,), 4, True, False, 0),
        ("group_norm_silu_temb", (20,), 5, True, True, 0),
        ("group_norm_two_sources", (12, 20), 4, False, False, 0),
        ("group_norm_silu_two_sources", (12, 20), 4, True, False, 0),
        ("group_norm_silu_two_sources_temb", (10, 18), 4, True, True, 0),
        ("group_norm_one_channel_groups", (6,), 6, True, False, 0),
        ("group_norm_one_group", (7,), 1, False, True, 0),
        ("group_norm_large_mean", (20,), 4, False, False, 30),
        ("group_norm_scale_shift", (20,), 4, False, "scale_shift", 0),
        ("group_norm_silu_scale_shift", (20,), 5, True, "scale_shift", 0),
        ("group_norm_silu_two_sources_scale_shift", (10, 18), 4, True, "scale_shift", 0),
    ):
        gen = generator(name)
        names = ("x",) if len(channels) == 1 else ("x1", "x2")
        # f32 holds `mean + normal` only after another rounding.
        inputs = {key: (mean + normal(gen, 2, 5, 7, c)).float().double() for key, c in zip(names, channels)}
        if temb:
            inputs["temb"] = normal(gen, 2, sum(channels) * (2 if temb == "scale_shift" else 1))
        fixture.op(
            name,
            {"op": "group_norm", "groups": groups, "eps": eps, "silu": silu, "temb": temb, "sources": len(channels)},
            function(groups, silu, temb == "scale_shift"),
            **inputs,
            w=(1 + normal(gen, sum(channels), scale=0.3)).float().double(),
            b=normal(gen, sum(channels), scale=0.3),
        )


def attentions(fixture):
    def function(heads):
        def attention(q, k, v):
            q, k, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v))  # [N, heads, T, C / heads]
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

        return attention

    for name, t, c, heads, sharpness in (
        ("attention_t49_c32_h1", 49, 32, 1, 1),
        ("attention_t49_c32_h2", 49, 32, 2, 1),
        ("attention_t16_c20_h1", 16, 20, 1, 1),
        ("attention_t16_c20_h2", 16, 20, 2, 1),
        ("attention_t15_c20_h5", 15, 20, 5, 1),
        ("attention_t1_c8_h2", 1, 8, 2, 1),
        ("attention_sharp", 16, 20, 1, 12),  # scores near ±150: e^score is no f32
    ):
        gen = generator(name)
        shape = (2, t, c)
        fixture.op(
            name,
            {"op": "attention", "heads": heads, "scale": (c // heads) ** -0.5},
            function(heads),
            q=normal(gen, *shape, scale=sharpness),
            k=normal(gen, *shape, scale=sharpness**0.5),
            v=normal(gen, *shape),
        )


def pointwise(fixture):
    gen = generator("silu")
    extremes = torch.tensor([-200.0, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 90.0, 200.0]).double().float().double()
    fixture.op("silu", {"op": "silu"}, lambda x: F.silu(x), x=torch.cat([extremes, normal(gen, 92, scale=3.0)]))
    fixture.op(
        "upsample",
        {"op": "upsample", "factor": 2, "mode": "nearest"},
        lambda x: to_nhwc(F.interpolate(to_nchw(x), scale_factor=2.0, mode="nearest")),
        x=normal(gen, 2, 3, 5, 6),
    )


def timestep_embeddings(fixture):
    t = torch.tensor([0, 1, 2, 10, 417, 500, 999, 3999])
    for dim in (32, 20):
        for freq_shift in (0, 1):
            for flip in (False, True):
                with double_precision():
                    y = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=freq_shift)
                fixture.case(
                    f"timestep_embedding_d{dim}_shift{freq_shift}_{'cos_sin' if flip else 'sin_cos'}",
                    {"op": "timestep_embedding", "dim": dim, "freq_shift": freq_shift, "flip_sin_to_cos": flip},
                    t=t,
                    y=y,
                )


def losses(fixture):
    """Mean squared error to ε, x_0 or v over all elements, and its gradient by the network's output."""
    with double_precision():
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    t = torch.tensor([0, 417, 999])
    for objective in ("epsilon", "x0", "v"):
        name = f"mse_{objective}"
        gen = generator(name)
        x0, noise, out = (normal(gen, 3, 5, 7, 3) for _ in range(3))
        out.requires_grad_()
        target = {"epsilon": noise, "x0": x0, "v": scheduler.get_velocity(x0, noise, t)}[objective]
        loss = (out - target).square().mean()
        loss.backward()
        alpha_bar = scheduler.alphas_cumprod[t]
        fixture.case(
            name,
            {"op": "mse", "objective": objective},
            x0=x0,
            noise=noise,
            t=t,
            sqrt_alphas_cumprod=alpha_bar.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alpha_bar).sqrt(),
            out=out,
            loss=loss[None],
            dout=out.grad,
        )


def make():
    fixture = Fixture()
    for part in (convolutions, linears, group_norms, attentions, pointwise, timestep_embeddings, losses):
        part(fixture)
    save("ops.safetensors", fixture.tensors, keep_f64={"loss", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"})
    lines = ",\n".join(f'  "{name}": {json.dumps(attributes)}' for name, attributes in fixture.cases.items())
    (FOLDER / "cases.json").write_text(f"{{\n{lines}\n}}\n")
