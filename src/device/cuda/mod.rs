//! The CUDA device; so far a GPU with the compiled kernels, and what an op asks of them: which one, how many threads, which arguments.

pub mod dnn;
mod gpu;
mod image;
mod launch;
mod work;

pub use gpu::{CudaError, Gpu, Memory};
pub use image::Image;
pub use launch::{Argument, Launch, Precision};
pub use work::{Convolution, ConvolutionShape, MatrixShape, Pass, Place, Product, ProductShape, Step, Work};
