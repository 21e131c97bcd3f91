//! The CUDA device; so far what an op asks of it: which kernel, how many threads, which arguments.

mod launch;

pub use launch::{Argument, Launch, Precision};
