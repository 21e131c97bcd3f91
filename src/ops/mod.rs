//! The operations a model and its training step are made of, one folder each: definition and gradient rule in `mod.rs`, CPU code in
//! `cpu.rs`, tests in `tests.rs`.
//!
//! The function named after an op puts it on a tape; the type of that name is the op itself.

pub mod accumulate;
pub mod adam_ema;
pub mod add;
pub mod attention;
pub mod cast;
pub mod conv2d;
pub mod copy;
pub mod grad_norm;
pub mod group_norm;
pub mod linear;
pub mod loss;
pub mod p_sample;
pub mod pad;
pub mod q_sample;
pub mod silu;
pub mod timestep_embedding;
pub mod upsample;

#[cfg(test)]
pub(crate) mod testing;

/// Elements that elementwise ops give a thread at a time.
const CHUNK: usize = 1 << 14;
