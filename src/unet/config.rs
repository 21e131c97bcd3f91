//! The `[model]` section of a config.

use serde::{Deserialize, Serialize};

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
    /// Groups of the middle attention's norm, if they differ (diffusers' `attn_norm_num_groups`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mid_attention_groups: Option<usize>,
    /// ε of every GroupNorm.
    pub norm_eps: f64,
    /// Dropout probability between the second norm and convolution of a residual block.
    pub dropout: f64,
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
            flip_sin_to_cos: false,
            freq_shift: 1.0,
        }
    }
}
