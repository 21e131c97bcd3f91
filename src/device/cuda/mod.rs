//! The CUDA device: a GPU with this program's kernels, cuDNN and cuBLASLt, and what ops ask of them.

mod beacon;
mod blas;
mod capture;
mod command;
mod device;
pub mod dnn;
mod error;
mod gpu;
mod image;
mod kernel;
mod lane;
mod launch;
mod library;
pub mod nccl;
mod pattern;
mod peak;
mod plans;
mod staging;
pub mod versions;
mod work;

pub use super::Precision;
pub use beacon::{At, Beacon, Place as BeaconPlace};
pub use blas::ProductChoice;
pub use capture::{Capture, Graph};
pub use command::{Command, Operands};
pub use device::{Cuda, WORKSPACE};
pub use error::CudaError;
pub use gpu::{Gpu, Memory, Tick};
pub use image::Image;
pub use kernel::PreparedKernel;
pub use lane::{Lane, Mark};
pub use launch::{Argument, Launch};
pub use plans::{Card, Choice, Piece, PlanTable, TimedChoice};
pub use work::{
    AlignedProduct, Convolution, ConvolutionShape, Form, MatrixShape, Pass, Place, Product, ProductAddresses,
    ProductShape, Step, Work,
};
