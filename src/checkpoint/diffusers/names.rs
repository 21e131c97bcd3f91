//! Names and shapes of a UNet2DModel's tensors, and the way from diffusers' memory order to ours and back.

use crate::unet::UnetConfig;

/// All tensors of the model with the shapes diffusers gives them (convolutions OIHW), in the order of the forward pass.
/// The config must be one that can be built (see [`check`]).
pub fn expected_tensors(config: &UnetConfig) -> Vec<(String, Vec<usize>)> {
    let mut list = List { tensors: Vec::new(), temb: 4 * config.channels.first().copied().unwrap_or(0) };
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
                list.attention(&format!("{block}.attentions.{j}"), c);
            }
        }
        if level + 1 < levels {
            list.conv(&format!("{block}.downsamplers.0.conv"), c, c, 3);
        }
    }
    list.resnet("mid_block.resnets.0", last, last);
    if config.mid_attention {
        list.attention("mid_block.attentions.0", last);
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
                list.attention(&format!("{block}.attentions.{j}"), c);
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
    temb: usize,
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
        self.linear(&format!("{name}.time_emb_proj"), self.temb, to);
        self.norm(&format!("{name}.norm2"), to);
        self.conv(&format!("{name}.conv2"), to, to, 3);
        if from != to {
            self.conv(&format!("{name}.{SHORTCUT}"), from, to, 1);
        }
    }

    fn attention(&mut self, name: &str, channels: usize) {
        self.norm(&format!("{name}.group_norm"), channels);
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

/// Whether the model can be built; the reason and diffusers' name of the key if not. Generous limits keep hostile numbers from
/// overflowing.
pub(super) fn check(config: &UnetConfig) -> Result<(), (&'static str, String)> {
    let err = |key, reason: String| Err((key, reason));
    let c = &config.channels;
    if c.is_empty() || c.len() > 12 || c.iter().any(|&c| c == 0 || c > 1 << 16) {
        return err("block_out_channels", format!("{c:?}: expected 1 to 12 levels of 1 to 65536 channels"));
    }
    if !c[0].is_multiple_of(2) || (c[0] / 2) as f64 <= config.freq_shift {
        return err(
            "block_out_channels",
            format!(
                "{c:?}: the first must be even and more than 2·freq_shift, for the sines and cosines of the timestep"
            ),
        );
    }
    if config.blocks == 0 || config.blocks > 64 {
        return err("layers_per_block", format!("{}: expected 1 to 64", config.blocks));
    }
    if config.image_channels == 0 || config.image_channels > 1 << 16 {
        return err("in_channels", format!("{}: expected 1 to 65536", config.image_channels));
    }
    if let Some(level) = config.attention_levels.iter().find(|&&l| l >= c.len()) {
        return err("down_block_types", format!("attention at level {level} of {} levels", c.len()));
    }
    if config.groups == 0 || c.iter().any(|c| !c.is_multiple_of(config.groups)) {
        return err("norm_num_groups", format!("{} does not divide all of the channels {c:?}", config.groups));
    }
    if config.mid_attention_groups.is_some_and(|g| g == 0 || !c[c.len() - 1].is_multiple_of(g)) {
        return err(
            "attn_norm_num_groups",
            format!("it does not divide the {} channels of the middle", c[c.len() - 1]),
        );
    }
    let mut attends = config.attention_levels.clone();
    attends.extend(config.mid_attention.then_some(c.len() - 1));
    if config.head_channels != 0 && attends.iter().any(|&l| !c[l].is_multiple_of(config.head_channels)) {
        return err("attention_head_dim", format!("{} does not divide the channels {c:?}", config.head_channels));
    }
    if !(config.norm_eps > 0.0 && config.norm_eps < 1.0) {
        return err("norm_eps", format!("{}: expected a number between 0 and 1", config.norm_eps));
    }
    if !(0.0..1.0).contains(&config.dropout) {
        return err("dropout", format!("{}: expected 0 or more and less than 1", config.dropout));
    }
    if !config.freq_shift.is_finite() || config.freq_shift < 0.0 {
        return err("freq_shift", format!("{}: expected 0 or more", config.freq_shift));
    }
    Ok(())
}
