//! NCCL: sums between the GPUs of several processes. No call waits for another process; whoever asks for something looks until it is done.

mod communicator;
mod library;
mod sum;
mod tree;

pub use communicator::{Communicator, ID_BYTES};
pub use sum::{Adding, Stage};
pub use tree::tree_sum;

use super::CudaError;
use library::Library;
use std::time::Duration;

/// The version of the library here, as NVIDIA writes it.
///
/// # Errors
/// No library, or one that this program does not use.
pub fn version() -> Result<String, CudaError> {
    Library::get().map(Library::version_name)
}

/// What is to be said where it does not come to an end though all processes wait for it.
pub fn stuck(operation: &str, after: Duration) -> CudaError {
    CudaError::Library {
        library: format!("NCCL {}", version().unwrap_or_default()),
        action: format!("finish {operation} within {} s", after.as_secs()),
        status: "all ranks wait for it".into(),
        said: "NCCL_DEBUG=INFO tells more, or a GPU hangs: see `nvidia-smi` and `dmesg`".into(),
    }
}
