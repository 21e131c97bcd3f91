//! The CUDA device; so far the compiled kernels, and what an op asks of them: which one, how many threads, which arguments.

mod image;
mod launch;

pub use image::Image;
pub use launch::{Argument, Launch, Precision};
