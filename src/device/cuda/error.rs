//! What keeps a GPU from working.

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;

/// The driver of CUDA 13.0, as `cuDriverGetVersion` has it: what nvcc 13 compiles needs it.
pub(super) const OLDEST_DRIVER: i32 = 13_000;

/// Bytes of shared memory that a block must be able to have by opting in, as on an A100: no launch asks for more.
pub(super) const BLOCK_MEMORY: usize = 163 << 10;

/// Blocks that a grid has at most along x, y and z, on all cards ("Technical Specifications per Compute Capability" of the programming guide).
pub(super) const LARGEST_GRID: [usize; 3] = [(1 << 31) - 1, 65_535, 65_535];

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
    /// More ranks of a machine than it has GPUs.
    #[error(
        "there is no GPU {ordinal} here: this machine has {count}, and each of its ranks takes one of its own; start as many ranks as there \
         are GPUs (CUDA_VISIBLE_DEVICES may hide some)"
    )]
    TooFewGpus {
        /// The number that was asked for, from 0.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// More images at a time than a kernel takes.
    #[error(
        "{kernel} would have a grid of {}×{}×{} blocks, and a GPU has at most {}×{}×{}: lower `train.batch` or `sample.batch`, or divide a \
         batch into more parts (`train.shards`)",
        .grid[0], .grid[1], .grid[2], LARGEST_GRID[0], LARGEST_GRID[1], LARGEST_GRID[2]
    )]
    LargeGrid {
        /// Its name.
        kernel: String,
        /// Blocks along x, y and z.
        grid: [usize; 3],
    },
    /// What `DDPM_DIST_CUDA_GRAPH` says.
    #[error("DDPM_DIST_CUDA_GRAPH={0} is unknown: it is on or off; unset it to have steps captured as CUDA graphs")]
    UnknownGraphSetting(String),
    /// What `DDPM_DIST_CUDA_PLANS` says.
    #[error(
        "DDPM_DIST_CUDA_PLANS={0} is unknown: it is off, or a folder by its absolute path; unset it to keep plans in the user's cache"
    )]
    UnknownPlanSetting(String),
    /// The driver refused something.
    #[error("CUDA cannot {action}: {}{}", said(*.source), advice(*.source))]
    Driver {
        /// What was asked for.
        action: String,
        /// Why not.
        source: DriverError,
    },
    /// A library of NVIDIA's that is nowhere.
    #[error(
        "there is no {library} here ({file}, looked for in LD_LIBRARY_PATH and where the system has its libraries): {install}"
    )]
    NoLibrary {
        /// `cuDNN 9`
        library: &'static str,
        /// Its file.
        file: &'static str,
        /// What to do.
        install: &'static str,
    },
    /// A library of a version that this program does not know.
    #[error("this is {library} {found}, and {needed} is needed: {install}")]
    WrongLibrary {
        /// `cuDNN`
        library: &'static str,
        /// Version, or what is missing in it.
        found: String,
        /// Versions.
        needed: &'static str,
        /// What to do.
        install: &'static str,
    },
    /// A library refused something.
    #[error("{library} cannot {action}: {status}{}{said}", if said.is_empty() { "" } else { "; " })]
    Library {
        /// With its version.
        library: String,
        /// What was asked for.
        action: String,
        /// Number and name of its status.
        status: String,
        /// What it says further; may be empty.
        said: String,
    },
    /// Nothing that a library offers may be used.
    #[error("{library} has nothing for the {what} that this program accepts: {}", refusals.join("; "))]
    NoPlan {
        /// With its version.
        library: String,
        /// Sizes.
        what: String,
        /// Why each was refused.
        refusals: Vec<String>,
    },
}

impl CudaError {
    /// Whether nothing is wrong: there is no GPU here, or the program was built for machines without one.
    pub fn is_absence(&self) -> bool {
        let no_device = DriverError(CUresult::CUDA_ERROR_NO_DEVICE);
        match self {
            CudaError::NoDriver | CudaError::NoKernels | CudaError::TooFewGpus { count: 0, .. } => true,
            CudaError::Driver { source, .. } => *source == no_device,
            _ => false,
        }
    }

    /// Whether there was too little memory.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, CudaError::Driver { source: DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY), .. })
    }
}

/// `out of memory (CUDA_ERROR_OUT_OF_MEMORY)`
fn said(error: DriverError) -> String {
    let text = error.error_string().map_or("no text".into(), |text| text.to_string_lossy());
    format!("{text} ({:?})", error.0)
}

/// What to do.
fn advice(DriverError(code): DriverError) -> &'static str {
    use CUresult::*;
    match code {
        CUDA_ERROR_OUT_OF_MEMORY => {
            "; other programs may hold memory of this GPU (`nvidia-smi` shows them), and `ddpm-dist plan` shows what is needed here: lower \
             `train.batch` or `sample.batch`"
        }
        CUDA_ERROR_ECC_UNCORRECTABLE | CUDA_ERROR_NVLINK_UNCORRECTABLE => {
            "; memory or a link of this card is damaged: if it happens again, take the card out (`nvidia-smi -q -d ECC` and `dmesg` tell more)"
        }
        CUDA_ERROR_UNKNOWN | CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "; look into `dmesg` for an Xid of the driver: after 79 (the card has fallen off the bus) the machine must be restarted, and the \
             card's power, cooling and seat be looked at"
        }
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_LAUNCH_FAILED => {
            "; a mistake of this program, or a fault of the card: if it happens again with another card, report it with what `dmesg` says"
        }
        _ => "",
    }
}
