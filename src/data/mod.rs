//! Data sets: from files to u8 pixels `[N, H, W, C]`, in the order that training visits them.
//!
//! [`Dataset::open`] reads MNIST's IDX, CIFAR-10's binary batches, NumPy arrays and folders of pictures; [`Order`] says
//! which image stands at which position of a run; [`Loader`] prepares one rank's batches ahead of the step. Pixels stay u8
//! until the device turns them into x_0 in \[−1, 1\]; the horizontal flip (`data.flip`) happens there too.
//!
//! What is read is never believed: sizes in headers are compared with the bytes that are there before memory is taken, and
//! every error names the file, what was expected and found, and what to do ([`DataError`]).

mod array;
mod cache;
mod cifar10;
mod compressed;
mod config;
mod contents;
mod dataset;
mod error;
mod folder;
mod idx;
mod jpeg;
mod loader;
mod npy;
mod on_demand;
mod order;
mod picture;
mod pixels;
mod progress;
mod resize;
mod source;
#[cfg(test)]
mod tests;
mod units;

pub use config::{DataConfig, Format, OnBadImage};
pub use dataset::{Dataset, Storage};
pub use error::{DataError, Fault};
pub use loader::{Batch, Loader, LoaderConfig};
pub use npy::{NpyHeader, npy_header};
pub use order::Order;
pub use progress::{Phase, Progress};
pub use units::{ByteSize, ImageSize};
