//! `unet/config.json`: the arguments of diffusers' UNet2DModel.

use super::DIFFUSERS_VERSION;
use super::error::DiffusersError;
use super::json::{Keys, whole};
use super::names::their_key;
use crate::unet::{TimestepForm, UnetConfig};
use serde_json::{Value, json};

/// Longest side of an image, as for `data.size`.
const MAX_SIDE: usize = 8192;

/// No image that large is halved more often; a network with more levels is refused whatever the size.
const MAX_HALVINGS: usize = 16;

/// All of UNet2DModel's arguments. `sample_size` is [height, width].
pub(super) fn to_json(config: &UnetConfig, sample_size: [usize; 2]) -> Value {
    let levels = config.channels.len();
    let attends = |level: &usize| config.attention_levels.contains(level);
    let down = |level| if attends(&level) { "AttnDownBlock2D" } else { "DownBlock2D" };
    let up = |level| if attends(&level) { "AttnUpBlock2D" } else { "UpBlock2D" };
    let [height, width] = sample_size;
    // null is norm_num_groups in one form and no norm in the other.
    let mid_attention_groups = match config.timestep {
        TimestepForm::Add => config.mid_attention_groups,
        TimestepForm::ScaleShift => config.norm_of_mid_attention(),
    };
    json!({
        "_class_name": "UNet2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": if height == width { json!(height) } else { json!([height, width]) },
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "center_input_sample": false,
        "time_embedding_type": "positional",
        "time_embedding_dim": null,
        // diffusers declares an integer; the paper's 1 is written as one.
        "freq_shift": whole(&json!(config.freq_shift)).map_or(json!(config.freq_shift), |n| json!(n)),
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "down_block_types": (0..levels).map(down).collect::<Vec<_>>(),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": (0..levels).rev().map(up).collect::<Vec<_>>(),
        "block_out_channels": config.channels,
        "layers_per_block": config.blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": 0,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "dropout": config.dropout,
        "act_fn": "silu",
        // null is one head of all channels in each block.
        "attention_head_dim": if config.head_channels == 0 { Value::Null } else { json!(config.head_channels) },
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": mid_attention_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": match config.timestep {
            TimestepForm::Add => "default",
            TimestepForm::ScaleShift => "scale_shift",
        },
        "add_attention": config.mid_attention,
        "class_embed_type": null,
        "num_class_embeds": null,
        "num_train_timesteps": null,
    })
}

/// The architecture, and the image size [height, width] if the config has one.
pub(super) fn from_json(keys: &Keys) -> Result<(UnetConfig, Option<[usize; 2]>), DiffusersError> {
    keys.only(
        "_class_name",
        json!("UNet2DModel"),
        json!("UNet2DModel"),
        "other networks have other inputs and blocks",
    )?;
    for (key, default, supported, why) in [
        ("center_input_sample", json!(false), json!(false), "pixels are in [-1, 1] already"),
        (
            "time_embedding_type",
            json!("positional"),
            json!("positional"),
            "timesteps are embedded as sines and cosines",
        ),
        ("mid_block_type", json!("UNetMidBlock2D"), json!("UNetMidBlock2D"), "there is one kind of middle block"),
        ("mid_block_scale_factor", json!(1), json!(1), "the middle block is not rescaled"),
        ("downsample_padding", json!(1), json!(0), "downsampling pads bottom and right, as the paper's code does"),
        ("downsample_type", json!("conv"), json!("conv"), "downsampling is a convolution of stride 2"),
        ("upsample_type", json!("conv"), json!("conv"), "upsampling is nearest x2 and a convolution"),
        ("class_embed_type", Value::Null, Value::Null, "there are no classes"),
        ("num_class_embeds", Value::Null, Value::Null, "there are no classes"),
    ] {
        keys.only(key, default, supported, why)?;
    }
    if !matches!(keys.text("act_fn", "silu")?.as_str(), "silu" | "swish") {
        return Err(keys.unsupported("act_fn", &json!("silu"), "\"silu\"", "the activation is SiLU"));
    }
    keys.get("num_train_timesteps"); // of learned embeddings only
    let channels = keys.list("block_out_channels", "a list of numbers", vec![224, 448, 672, 896], whole)?;
    if channels.is_empty() {
        return Err(keys.bad_value("block_out_channels", "one level or more"));
    }
    let attention_levels = attention_levels(keys, channels.len())?;
    let image_channels = keys.count("in_channels", 3)?;
    if keys.count("out_channels", 3)? != image_channels {
        let why = "the output is of the input's kind; learned variances have twice the channels";
        return Err(keys.unsupported("out_channels", &json!(3), &format!("in_channels = {image_channels}"), why));
    }
    let embedding = keys.count_or_null("time_embedding_dim", None)?;
    if embedding.is_some_and(|n| channels.first().is_none_or(|c| c.checked_mul(4) != Some(n))) {
        let why = "the timestep embedding has four times the first level's channels";
        return Err(keys.unsupported("time_embedding_dim", &Value::Null, "null", why));
    }
    let head_channels = keys.count_or_null("attention_head_dim", Some(8))?;
    if head_channels == Some(0) {
        return Err(keys.bad_value("attention_head_dim", "1 or more, or null"));
    }
    let timestep = timestep_form(keys)?;
    let groups = keys.count("norm_num_groups", 32)?;
    let config = UnetConfig {
        image_channels,
        channels,
        blocks: keys.count("layers_per_block", 2)?,
        attention_levels,
        mid_attention: keys.flag("add_attention", true)?,
        head_channels: head_channels.unwrap_or(0),
        groups,
        mid_attention_groups: mid_attention_groups(keys, timestep, groups)?,
        norm_eps: keys.number("norm_eps", 1e-5)?,
        dropout: keys.number("dropout", 0.0)?,
        timestep,
        flip_sin_to_cos: keys.flag("flip_sin_to_cos", true)?,
        freq_shift: keys.number("freq_shift", 0.0)?,
    };
    if config.groups == 0 || config.channels.iter().any(|c| !c.is_multiple_of(config.groups)) {
        return Err(keys.bad_value("norm_num_groups", &format!("a divisor of all of {:?}", config.channels)));
    }
    let size = sample_size(keys)?;
    // Where the size is not said, one that the levels divide.
    let side = 1 << config.halvings().min(MAX_HALVINGS);
    let [height, width] = size.unwrap_or([side; 2]);
    config
        .validate(height, width)
        .map_err(|refused| keys.bad_value(their_key(&refused.key), &format!("{}: {}", refused.range, refused.why)))?;
    Ok((config, size))
}

fn timestep_form(keys: &Keys) -> Result<TimestepForm, DiffusersError> {
    const KEY: &str = "resnet_time_scale_shift";
    match keys.text(KEY, "default")?.as_str() {
        "default" => Ok(TimestepForm::Add),
        "scale_shift" => Ok(TimestepForm::ScaleShift),
        _ => {
            let why = "the timestep is added before the norm, or scales and shifts after it";
            Err(keys.unsupported(KEY, &json!("default"), "\"default\" or \"scale_shift\"", why))
        }
    }
}

/// null is `norm_num_groups` where the timestep is added, and no norm where it scales and shifts.
fn mid_attention_groups(keys: &Keys, timestep: TimestepForm, groups: usize) -> Result<Option<usize>, DiffusersError> {
    const KEY: &str = "attn_norm_num_groups";
    let found = keys.count_or_null(KEY, None)?;
    if found == Some(0) {
        return Err(keys.bad_value(KEY, "1 or more, or null"));
    }
    Ok(match timestep {
        TimestepForm::Add => found,
        TimestepForm::ScaleShift => Some(found.unwrap_or(0)).filter(|&n| n != groups),
    })
}

/// Levels that attend, from the block types; the way up must mirror the way down.
fn attention_levels(keys: &Keys, levels: usize) -> Result<Vec<usize>, DiffusersError> {
    const DOWN: [&str; 4] = ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"];
    const UP: [&str; 4] = ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"];
    let mut down = block_types(keys, "down_block_types", DOWN, "DownBlock2D", "AttnDownBlock2D")?;
    let mut up = block_types(keys, "up_block_types", UP, "UpBlock2D", "AttnUpBlock2D")?;
    for (key, found) in [("down_block_types", down.len()), ("up_block_types", up.len())] {
        if found != levels {
            return Err(keys.bad_value(key, &format!("{levels} blocks, as many as block_out_channels")));
        }
    }
    up.reverse();
    if down != up {
        let why = "each level attends on the way down and on the way up, or on neither";
        return Err(keys.unsupported("up_block_types", &json!(UP), "the mirror image of down_block_types", why));
    }
    Ok(down.drain(..).enumerate().filter_map(|(level, attends)| attends.then_some(level)).collect())
}

fn block_types(
    keys: &Keys,
    key: &'static str,
    default: [&str; 4],
    plain: &str,
    attention: &str,
) -> Result<Vec<bool>, DiffusersError> {
    let names =
        keys.list(key, "a list of names", default.map(String::from).to_vec(), |v| v.as_str().map(String::from))?;
    names
        .iter()
        .map(|name| match name.strip_prefix("UNetRes").unwrap_or(name) {
            name if name == plain => Ok(false),
            name if name == attention => Ok(true),
            _ => {
                let why = format!("{name} has other layers");
                Err(keys.unsupported(key, &json!(default), &format!("{plain} and {attention}"), &why))
            }
        })
        .collect()
}

fn sample_size(keys: &Keys) -> Result<Option<[usize; 2]>, DiffusersError> {
    const KEY: &str = "sample_size";
    let expected = format!("1 to {MAX_SIDE}, [height, width] of these, or null");
    let size = match keys.get(KEY) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(sides)) => match &sides[..] {
            [height, width] => whole(height).zip(whole(width)),
            _ => None,
        },
        Some(side) => whole(side).map(|s| (s, s)),
    };
    let (height, width) = size
        .filter(|(height, width)| [height, width].iter().all(|side| (1..=MAX_SIDE).contains(*side)))
        .ok_or_else(|| keys.bad_value(KEY, &expected))?;
    Ok(Some([height, width]))
}
