//! What keeps a GPU from working.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;

/// The driver of CUDA 13.0, as `cuDriverGetVersion` has it: what nvcc 13 compiles needs it.
pub(super) const OLDEST_DRIVER: i32 = 13_000;

/// Bytes of shared memory that a block must be able to have by opting in, as on an A100: no launch asks for more.
pub(super) const BLOCK_MEMORY: usize = 163 << 10;

/// What keeps a GPU from working.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// Neither a GPU nor a driver, or a container that was not given them.
    #[error(
        "there is no CUDA driver here (libcuda.so.1): install NVIDIA's driver, or start the container with --gpus all"
    )]
    NoDriver,
    /// `cuDriverGetVersion`, 1000·major + 10·minor.
    #[error("the driver is for CUDA {}.{}, and {}.{} or later is needed: update it", .0 / 1000, .0 % 1000 / 10, OLDEST_DRIVER / 1000, OLDEST_DRIVER % 1000 / 10)]
    OldDriver(i32),
    /// See [`Image::embedded`].
    #[error("this program has no CUDA kernels, as there was no nvcc where it was built")]
    NoKernels,
    /// cuDNN is not to be found.
    #[error(
        "there is no cuDNN here (libcudnn.so): `pip install nvidia-cudnn-cu13`, and put its folder on LD_LIBRARY_PATH"
    )]
    NoDnn,
    /// cuBLASLt is not to be found.
    #[error(
        "there is no cuBLASLt here (libcublasLt.so): `pip install nvidia-cublas==13.*`, and put its folder on LD_LIBRARY_PATH"
    )]
    NoBlas,
    /// cuBLASLt refused something.
    #[error("cuBLASLt cannot {action}: {source}")]
    Blas {
        /// What was asked for.
        action: &'static str,
        /// Why not.
        source: CublasError,
    },
    /// cuBLASLt has no algorithm for a product.
    #[error("cuBLASLt cannot multiply {shape}: {source}")]
    NoProduct {
        /// Sizes and types.
        shape: String,
        /// Why not.
        source: CublasError,
    },
    /// A card of a generation before those that kernels are compiled for.
    #[error(
        "GPU {ordinal} ({name}) has compute capability {}.{}, and the kernels are for {}.{} and later ({architectures}): use an A100, H100, H200 or B200",
        .found.0, .found.1, .oldest.0, .oldest.1
    )]
    OldCard {
        /// Its number.
        ordinal: usize,
        /// `Tesla V100-SXM2-16GB`
        name: String,
        /// Major and minor.
        found: (i32, i32),
        /// Likewise, the lowest that will do.
        oldest: (i32, i32),
        /// See [`Image::architectures`].
        architectures: &'static str,
    },
    /// A smaller card of a generation that would do.
    #[error(
        "GPU {ordinal} ({name}) gives a block {found} bytes of shared memory, and the kernels take up to {BLOCK_MEMORY}: use an A100, H100, H200 or B200"
    )]
    SmallCard {
        /// Its number.
        ordinal: usize,
        /// `NVIDIA GeForce RTX 4090`
        name: String,
        /// Bytes.
        found: usize,
    },
    /// The driver refused something.
    #[error("CUDA cannot {action}: {source}")]
    Driver {
        /// What was asked for.
        action: String,
        /// Why not.
        source: DriverError,
    },
}

impl CudaError {
    /// Whether nothing is wrong: there is no GPU here, or the program was built for machines without one.
    pub fn is_absence(&self) -> bool {
        let no_device = DriverError(CUresult::CUDA_ERROR_NO_DEVICE);
        match self {
            CudaError::NoDriver | CudaError::NoKernels => true,
            CudaError::Driver { source, .. } => *source == no_device,
            _ => false,
        }
    }

    /// Whether there was too little memory.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, CudaError::Driver { source: DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY), .. })
    }
}
