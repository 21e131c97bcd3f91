"""`diffusers_dir/`: directories as diffusers saves them, and what must be read from them.

diffusers_dir/f32/          a pipeline with DDPMScheduler, f32 weights
diffusers_dir/f16_ddim/     one with DDIMScheduler, f16 weights, trained betas
diffusers_dir/old/          a UNet2DModel alone with attention's old names and shapes, bf16 weights
diffusers_dir/*.expected.safetensors    the weights in f32, convolutions as OHWI, 1x1 shortcuts as [O, I]
diffusers_dir/names.json    whole models: [config of UNet2DModel, {name: shape} (of the largest, null), tensors, parameters]

    python diffusers_dir.py check DIR COPY      # DIR as `ddpm-dist export` writes it

loads DIR as a user would, samples two steps, and saves what was loaded to COPY, which must hold equal weights.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from common import FOLDER, save, to_our_layout

ROOT = FOLDER / "diffusers_dir"

PAPER = dict(
    center_input_sample=False, time_embedding_type="positional", freq_shift=1, flip_sin_to_cos=False,
    downsample_padding=0, act_fn="silu", attention_head_dim=None, norm_eps=1e-6,
)


def blocks(channels, attention):
    down = ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(len(channels))]
    up = ["AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(range(len(channels)))]
    return dict(block_out_channels=channels, down_block_types=down, up_block_types=up)


def model(seed, **config):
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**PAPER, **config})
    for p in unet.parameters():  # biases and norms are constant at first, which would hide a mix-up
        torch.nn.init.normal_(p, std=0.3)
    return unet


def expect(unet, name):
    weights = {key: to_our_layout(value) for key, value in unet.state_dict().items()}
    save(f"{ROOT.name}/{name}.expected.safetensors", weights)


def make():
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()

    unet = model(1, sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=2,
                 attn_norm_num_groups=4, dropout=0.25, **blocks([4, 8], [1]))
    scheduler = DDPMScheduler(num_train_timesteps=400, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large",
                              prediction_type="v_prediction", clip_sample_range=2.0, timestep_spacing="trailing")
    DDPMPipeline(unet, scheduler).save_pretrained(ROOT / "f32")
    expect(unet, "f32")

    unet = model(2, sample_size=[4, 6], in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=2,
                 attention_head_dim=2, flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5, **blocks([4, 6], [0])).half()
    scheduler = DDIMScheduler(num_train_timesteps=5, trained_betas=[0.1, 0.2, 0.3, 0.4, 0.5], clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type="sample")
    DDIMPipeline(unet, scheduler).save_pretrained(ROOT / "f16_ddim")
    expect(unet, "f16_ddim")

    unet = model(3, sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=2,
                 add_attention=True, **blocks([4], [0])).bfloat16()
    unet.save_pretrained(ROOT / "old")
    expect(unet, "old")
    weights = ROOT / "old/diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(weights).items():
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            if f".{new}.weight" in name:
                tensor = tensor[:, :, None, None]
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor.contiguous()
    save_file(renamed, weights, {"format": "pt"})

    names = []
    cifar10 = dict(sample_size=32, layers_per_block=2, dropout=0.1, **blocks([128, 256, 256, 256], [1]))
    lsun256 = dict(sample_size=256, layers_per_block=2, dropout=0.0, **blocks([128, 128, 256, 256, 512, 512], [4]))
    odd = dict(sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, add_attention=False,
               norm_num_groups=8, **blocks([32, 96, 64], [0, 2]))
    scaled = dict(odd, resnet_time_scale_shift="scale_shift", add_attention=True)
    scaled_norm = dict(scaled, attn_norm_num_groups=16)
    for config in [cifar10, lsun256, odd, scaled, scaled_norm]:
        with torch.device("meta"):
            unet = UNet2DModel(**{**PAPER, **config})
        shapes = {k: list(v.shape) for k, v in unet.state_dict().items()}
        listed = None if config is lsun256 else shapes
        names.append([{**PAPER, **config}, listed, len(shapes), sum(p.numel() for p in unet.parameters())])
    (ROOT / "names.json").write_text("[\n" + ",\n".join(json.dumps(n, separators=(",", ":")) for n in names) + "\n]\n")


def check(directory, copy):
    pipeline = DDPMPipeline.from_pretrained(directory)
    unet, report = UNet2DModel.from_pretrained(directory, subfolder="unet", output_loading_info=True)
    assert not any(report.values()), report
    image = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    print(type(pipeline.scheduler).__name__, dict(pipeline.unet.config), image.shape, sep="\n")
    pipeline.save_pretrained(copy)
    mine, theirs = (load_file(Path(d) / "unet/diffusion_pytorch_model.safetensors") for d in (directory, copy))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    print(f"{len(mine)} equal tensors")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "check":
        sys.exit(__doc__)
    check(*sys.argv[2:])
