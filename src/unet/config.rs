//! The `[model]` section of a config.

use crate::config::OutOfRange;
use serde::{Deserialize, Serialize};

/// More levels than any image could be halved.
const MAX_LEVELS: usize = 16;
/// More channels than any model has; keeps the sizes of weights far from overflow.
const MAX_CHANNELS: usize = 1 << 16;

/// Most operations of a forward pass; a training step takes a few times as many, and all of them are counted in 64 bits.
const MAX_WORK: u128 = 1 << 60;

/// What the timestep does in a residual block: its projection has so many columns for each of the block's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepForm {
    /// One, which is added before the second norm (Ho et al. 2020).
    Add,
    /// Two: what the second norm gives is multiplied by 1 + the first, and the second is added (Nichol & Dhariwal 2021).
    ScaleShift,
}

impl TimestepForm {
    /// Columns for a channel.
    pub fn columns(self) -> usize {
        match self {
            TimestepForm::Add => 1,
            TimestepForm::ScaleShift => 2,
        }
    }
}

/// The architecture of the denoising UNet, without the image size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnetConfig {
    /// Channels of the image: 1 grey, 3 colour.
    pub image_channels: usize,
    /// Channels of each level, highest resolution first; each level halves the resolution of the one before.
    pub channels: Vec<usize>,
    /// Residual blocks per level on the way down; one more on the way up.
    pub blocks: usize,
    /// Levels (0 is the highest resolution) whose residual blocks are followed by attention.
    pub attention_levels: Vec<usize>,
    /// Attention between the two middle blocks.
    pub mid_attention: bool,
    /// Channels per attention head; 0 means one head.
    pub head_channels: usize,
    /// Groups of every GroupNorm.
    pub groups: usize,
    /// Groups of the middle attention's norm, if they differ (diffusers' `attn_norm_num_groups`); 0 means no norm, which
    /// diffusers has where the timestep scales and shifts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mid_attention_groups: Option<usize>,
    /// ε of every GroupNorm.
    pub norm_eps: f64,
    /// Dropout probability between the second norm and convolution of a residual block.
    pub dropout: f64,
    /// What the timestep does in a residual block.
    pub timestep: TimestepForm,
    /// Timestep embedding: cosines before sines (false in the paper's code).
    pub flip_sin_to_cos: bool,
    /// Timestep embedding: the frequencies' exponent is divided by half − `freq_shift` (1 in the paper's code).
    pub freq_shift: f64,
}

impl Default for UnetConfig {
    /// The paper's CIFAR-10 model: 35,746,307 parameters at 32×32.
    fn default() -> Self {
        UnetConfig {
            image_channels: 3,
            channels: vec![128, 256, 256, 256],
            blocks: 2,
            attention_levels: vec![1],
            mid_attention: true,
            head_channels: 0,
            groups: 32,
            mid_attention_groups: None,
            norm_eps: 1e-6,
            dropout: 0.1,
            timestep: TimestepForm::Add,
            flip_sin_to_cos: false,
            freq_shift: 1.0,
        }
    }
}

impl UnetConfig {
    /// Number of times the resolution is halved.
    pub fn halvings(&self) -> usize {
        self.channels.len().saturating_sub(1)
    }

    /// Groups of the middle attention's norm, if it has one.
    pub fn norm_of_mid_attention(&self) -> Option<usize> {
        Some(self.mid_attention_groups.unwrap_or(self.groups)).filter(|&groups| groups > 0)
    }

    /// Checks that a pass over `images` images of `height`×`width` pixels can be counted: bytes and FLOPs of all ops together stay far
    /// below 2^63, so that no product of sizes wraps. What passes may still be too much for any machine.
    ///
    /// # Errors
    /// Channels, image size or number of images (named `images_key`) that only a slip of the keyboard makes.
    pub fn validate_work(
        &self,
        height: usize,
        width: usize,
        images: usize,
        images_key: &str,
    ) -> Result<(), OutOfRange> {
        let work = |images: usize| self.work_bound(height, width).saturating_mul(images as u128);
        if work(images) <= MAX_WORK {
            return Ok(());
        }
        let why = "a pass over the network would take more than 2^60 operations";
        if work(1) <= MAX_WORK {
            let most = MAX_WORK / work(1).max(1);
            return Err(OutOfRange::new(
                images_key,
                images,
                format!("at most {most} for this model and image size"),
                why,
            ));
        }
        let channels = format!("{:?}", self.channels);
        Err(OutOfRange::new(
            "model.channels",
            channels,
            format!("fewer channels, less attention, or images smaller than {height}×{width}"),
            why,
        ))
    }

    /// Not less than the operations, elements or bytes of a forward pass over one image: per level every layer as a 3×3 convolution between
    /// concatenations of the widest levels, and as an attention.
    fn work_bound(&self, height: usize, width: usize) -> u128 {
        let widest = self.channels.iter().copied().max().unwrap_or(0).max(16) as u128;
        let layers = 2 * self.blocks as u128 + 4;
        let mut bound = 0u128;
        for level in 0..self.channels.len().min(MAX_LEVELS) {
            let pixels = ((height >> level).max(1) as u128).saturating_mul((width >> level).max(1) as u128);
            let convolutions = (2 * 2 * 9 * 2 * widest * widest).saturating_mul(pixels);
            let attends = self.attention_levels.contains(&level) || level + 1 == self.channels.len();
            let attention = if attends { (4 * widest).saturating_mul(pixels).saturating_mul(pixels) } else { 0 };
            bound = bound.saturating_add(convolutions.saturating_add(attention).saturating_mul(layers));
        }
        bound
    }

    /// Checks that the network exists for images of `height`×`width` pixels.
    ///
    /// # Errors
    /// The first key whose value is out of range.
    pub fn validate(&self, height: usize, width: usize) -> Result<(), OutOfRange> {
        OutOfRange::check(
            [1, 3].contains(&self.image_channels),
            "model.image_channels",
            self.image_channels,
            "1 or 3",
            "images are grey or colour",
        )?;
        OutOfRange::check(
            (1..=MAX_LEVELS).contains(&self.channels.len()),
            "model.channels",
            format!("{:?}", self.channels),
            format!("1 to {MAX_LEVELS} levels"),
            "each number is one level, and each level halves the resolution",
        )?;
        OutOfRange::check(self.groups > 0, "model.groups", self.groups, "groups ≥ 1", "GroupNorm needs a group")?;
        OutOfRange::check(
            (1..=64).contains(&self.blocks),
            "model.blocks",
            self.blocks,
            "1 ≤ blocks ≤ 64",
            "residual blocks per level",
        )?;
        for &c in &self.channels {
            OutOfRange::check(
                (1..=MAX_CHANNELS).contains(&c),
                "model.channels",
                format!("{:?}", self.channels),
                format!("1 to {MAX_CHANNELS} channels in each level"),
                "the paper's largest level has 512",
            )?;
            OutOfRange::check(
                c.is_multiple_of(self.groups),
                "model.channels",
                format!("{:?}", self.channels),
                format!("multiples of model.groups = {}", self.groups),
                "GroupNorm divides the channels of every level into groups",
            )?;
        }
        let first = self.channels[0];
        OutOfRange::check(
            (first / 2) as f64 > self.freq_shift && self.freq_shift >= 0.0,
            "model.freq_shift",
            self.freq_shift,
            format!("0 ≤ freq_shift < {}", first / 2),
            "half of the first level's channels, less freq_shift, divides the exponent of the timestep frequencies",
        )?;
        let lowest = self.halvings();
        for &level in &self.attention_levels {
            OutOfRange::check(
                level <= lowest,
                "model.attention_levels",
                format!("{:?}", self.attention_levels),
                format!("levels 0 to {lowest}"),
                "levels are counted from the highest resolution",
            )?;
        }
        let middle = self.mid_attention.then_some(lowest);
        for level in self.attention_levels.iter().copied().chain(middle) {
            OutOfRange::check(
                self.head_channels == 0 || self.channels[level].is_multiple_of(self.head_channels),
                "model.head_channels",
                self.head_channels,
                format!("a divisor of {}", self.channels[level]),
                format!("heads share the channels of level {level} equally (0: one head)"),
            )?;
        }
        if let Some(groups) = self.mid_attention_groups {
            let may_lack = self.timestep == TimestepForm::ScaleShift;
            OutOfRange::check(
                if groups == 0 { may_lack } else { self.channels[lowest].is_multiple_of(groups) },
                "model.mid_attention_groups",
                groups,
                format!("a divisor of {}{}", self.channels[lowest], if may_lack { ", or 0: no norm" } else { "" }),
                "the middle attention's norm divides the channels of the lowest level",
            )?;
        }
        OutOfRange::check(
            self.norm_eps as f32 > 0.0 && self.norm_eps < 1.0,
            "model.norm_eps",
            self.norm_eps,
            "0 < norm_eps < 1 in f32",
            "it keeps the division by the standard deviation finite",
        )?;
        OutOfRange::check(
            (0.0..1.0).contains(&self.dropout) && (self.dropout as f32) < 1.0,
            "model.dropout",
            self.dropout,
            "0 ≤ dropout < 1 in f32",
            "a probability; at 1 nothing would be left",
        )?;
        let factor = 1 << lowest;
        OutOfRange::check(
            height > 0 && width > 0 && height.is_multiple_of(factor) && width.is_multiple_of(factor),
            "data.size",
            format!("{height}×{width}"),
            format!("multiples of {factor}"),
            format!("{} levels halve the image {lowest} times; use fewer levels or another size", self.channels.len()),
        )
    }
}
