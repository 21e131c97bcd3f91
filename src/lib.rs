//! Distributed training of denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020).
//!
//! The modules are listed in the order in which they may depend on each other: each uses only those above it.

pub mod simd;
pub mod files;
pub mod machine;
pub mod config;
pub mod rng;
pub mod diffusion;
pub mod device;
pub mod rendezvous;
pub mod collective;
pub mod tape;
pub mod ops;
pub mod unet;
pub mod data;
pub mod checkpoint;
pub mod report;
pub mod cluster;
pub mod sample;
pub mod train;
pub mod cli;
