//! The operations a model and its training step are made of, one folder each: definition and gradient rule in `mod.rs`, CPU code in
//! `cpu.rs`, tests in `tests.rs`.
//!
//! The function named after an op puts it on a tape; the type of that name is the op itself.

pub mod add;
pub mod attention;
pub mod copy;
pub mod group_norm;
pub mod silu;

#[cfg(test)]
pub(crate) mod testing;

/// Elements that elementwise ops give a thread at a time.
const CHUNK: usize = 1 << 14;
