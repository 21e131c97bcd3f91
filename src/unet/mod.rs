//! The denoising UNet of Ho et al. 2020 as a tape of ops.

mod architecture;
mod config;
mod init;

#[cfg(test)]
mod tests;

pub use architecture::{Randomness, unet};
pub use config::{TimestepForm, UnetConfig};
pub use init::initial_parameters;
