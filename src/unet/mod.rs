//! The denoising UNet of Ho et al. 2020 as a tape of ops.

mod config;

pub use config::UnetConfig;
