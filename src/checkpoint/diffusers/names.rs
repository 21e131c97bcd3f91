//! Names and shapes of a UNet2DModel's tensors, and the way from diffusers' memory order to ours and back.

use crate::unet::UnetConfig;

/// All tensors of the model with the shapes diffusers gives them (convolutions OIHW), in the order of the forward pass.
/// The config must be one that can be built ([`UnetConfig::validate`]).
pub fn expected_tensors(config: &UnetConfig) -> Vec<(String, Vec<usize>)> {
    let temb = 4 * config.channels.first().copied().unwrap_or(0);
    let mut list = List { tensors: Vec::new(), temb, columns: config.timestep.columns() };
    let levels = config.channels.len();
    let (Some(&first), Some(&last)) = (config.channels.first(), config.channels.last()) else {
        return list.tensors;
    };
    list.conv("conv_in", config.image_channels, first, 3);
    list.linear("time_embedding.linear_1", first, list.temb);
    list.linear("time_embedding.linear_2", list.temb, list.temb);
    let mut h = first;
    for (level, &c) in config.channels.iter().enumerate() {
        let block = format!("down_blocks.{level}");
        for j in 0..config.blocks {
            list.resnet(&format!("{block}.resnets.{j}"), h, c);
            h = c;
            if config.attention_levels.contains(&level) {
                list.attention(&format!("{block}.attentions.{j}"), c, true);
            }
        }
        if level + 1 < levels {
            list.conv(&format!("{block}.downsamplers.0.conv"), c, c, 3);
        }
    }
    list.resnet("mid_block.resnets.0", last, last);
    if config.mid_attention {
        list.attention("mid_block.attentions.0", last, config.norm_of_mid_attention().is_some());
    }
    list.resnet("mid_block.resnets.1", last, last);
    for (i, level) in (0..levels).rev().enumerate() {
        let block = format!("up_blocks.{i}");
        let c = config.channels[level];
        for j in 0..=config.blocks {
            // Skips are taken in reverse: the level's blocks, then what entered the level.
            let skip = if j < config.blocks { c } else { config.channels[level.saturating_sub(1)] };
            list.resnet(&format!("{block}.resnets.{j}"), h + skip, c);
            h = c;
            if config.attention_levels.contains(&level) {
                list.attention(&format!("{block}.attentions.{j}"), c, true);
            }
        }
        if level > 0 {
            list.conv(&format!("{block}.upsamplers.0.conv"), c, c, 3);
        }
    }
    list.norm("conv_norm_out", first);
    list.conv("conv_out", first, config.image_channels, 3);
    list.tensors
}

struct List {
    tensors: Vec<(String, Vec<usize>)>,
    /// Width of the timestep embedding, and columns of its projection for a channel.
    temb: usize,
    columns: usize,
}

impl List {
    fn weight_and_bias(&mut self, name: &str, weight: Vec<usize>) {
        let bias = vec![weight[0]];
        self.tensors.push((format!("{name}.weight"), weight));
        self.tensors.push((format!("{name}.bias"), bias));
    }

    fn conv(&mut self, name: &str, from: usize, to: usize, side: usize) {
        self.weight_and_bias(name, vec![to, from, side, side]);
    }

    fn linear(&mut self, name: &str, from: usize, to: usize) {
        self.weight_and_bias(name, vec![to, from]);
    }

    fn norm(&mut self, name: &str, channels: usize) {
        self.weight_and_bias(name, vec![channels]);
    }

    fn resnet(&mut self, name: &str, from: usize, to: usize) {
        self.norm(&format!("{name}.norm1"), from);
        self.conv(&format!("{name}.conv1"), from, to, 3);
        self.linear(&format!("{name}.time_emb_proj"), self.temb, self.columns * to);
        self.norm(&format!("{name}.norm2"), to);
        self.conv(&format!("{name}.conv2"), to, to, 3);
        if from != to {
            self.conv(&format!("{name}.{SHORTCUT}"), from, to, 1);
        }
    }

    fn attention(&mut self, name: &str, channels: usize, has_norm: bool) {
        if has_norm {
            self.norm(&format!("{name}.group_norm"), channels);
        }
        for projection in ["to_q", "to_k", "to_v", "to_out.0"] {
            self.linear(&format!("{name}.{projection}"), channels, channels);
        }
    }
}

const SHORTCUT: &str = "conv_shortcut";

/// The shape of a tensor in our memory: OHWI for convolutions, `[O, I]` for the 1×1 ones of the shortcuts.
pub fn our_shape(theirs: &[usize]) -> Vec<usize> {
    match *theirs {
        [o, i, 1, 1] => vec![o, i],
        [o, i, h, w] => vec![o, h, w, i],
        _ => theirs.to_vec(),
    }
}

/// Reorders a tensor of diffusers' shape `[O, I, H, W]` to our `[O, H, W, I]`; anything else is the same in both.
pub(super) fn to_ours(shape: &[usize], theirs: Vec<f32>) -> Vec<f32> {
    match *shape {
        [_, i, h, w] if h * w > 1 => transpose_inner(&theirs, i, h * w),
        _ => theirs,
    }
}

/// The inverse of [`to_ours`]; `shape` is again diffusers'.
pub(super) fn to_theirs(shape: &[usize], ours: &[f32]) -> Vec<f32> {
    match *shape {
        [_, i, h, w] if h * w > 1 => transpose_inner(ours, h * w, i),
        _ => ours.to_vec(),
    }
}

/// Transposes each `[rows, columns]` matrix of a stack of them.
fn transpose_inner(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact(rows * columns) {
        for c in 0..columns {
            out.extend(matrix.iter().skip(c).step_by(columns));
        }
    }
    out
}

/// The present name of a tensor: attention projections were once called `query`, `key`, `value` and `proj_attn`.
pub(super) fn present_name(name: &str) -> String {
    if let Some((path, parameter)) = name.rsplit_once('.')
        && let Some((block, old)) = path.rsplit_once('.')
        && block.contains("attentions.")
    {
        for (was, is) in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")] {
            if old == was {
                return format!("{block}.{is}.{parameter}");
            }
        }
    }
    name.to_string()
}

/// Whether a stored shape is the expected one; attention projections were once 1×1 convolutions, `[C, C, 1, 1]`.
pub(super) fn fits(name: &str, expected: &[usize], found: &[usize]) -> bool {
    let was_convolution = name.contains(".attentions.") && name.ends_with(".weight") && expected.len() == 2;
    found == expected
        || (was_convolution && found.strip_prefix(expected).is_some_and(|rest| rest.iter().all(|&d| d == 1)))
}

/// diffusers' key for one of ours, as [`UnetConfig::validate`] names it.
pub(super) fn their_key(ours: &str) -> &'static str {
    match ours {
        "model.image_channels" => "in_channels",
        "model.channels" => "block_out_channels",
        "model.blocks" => "layers_per_block",
        "model.attention_levels" => "down_block_types",
        "model.head_channels" => "attention_head_dim",
        "model.groups" => "norm_num_groups",
        "model.mid_attention_groups" => "attn_norm_num_groups",
        "model.norm_eps" => "norm_eps",
        "model.dropout" => "dropout",
        "model.freq_shift" => "freq_shift",
        "model.timestep" => "resnet_time_scale_shift",
        _ => "sample_size",
    }
}
