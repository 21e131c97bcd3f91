//! Where kernels run: on a machine made of software, or with `DDPM_DIST_KERNELS=gpu` on the first GPU.

use crate::{gpu, sim};
use ddpm_dist::device::cuda::Launch;

/// A buffer of a launch.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// Read only.
    Input(Vec<u8>),
    /// So many bytes, all of which the kernel must write.
    Output(usize),
    /// Read and written.
    Updated(Vec<u8>),
}

/// Whether kernels run on a GPU.
///
/// # Panics
/// If the environment asks for something else.
pub fn is_gpu() -> bool {
    match std::env::var("DDPM_DIST_KERNELS").as_deref() {
        Ok("gpu") => true,
        Ok("sim") | Err(_) => false,
        Ok(other) => panic!("DDPM_DIST_KERNELS={other}: gpu or sim"),
    }
}

/// Runs a launch that must be well; gives what its outputs and updated buffers hold, in the order of its arguments.
#[track_caller]
pub fn run_launch(launch: &Launch, inputs: &[Buffer], outputs: &[Buffer]) -> Vec<Vec<u8>> {
    run_with(launch, inputs, outputs, &Buffer::Output(0))
}

/// The same with a workspace, which is an output of the launch that writes it, and an input of the next.
#[track_caller]
pub fn run_with(launch: &Launch, inputs: &[Buffer], outputs: &[Buffer], workspace: &Buffer) -> Vec<Vec<u8>> {
    let result = match is_gpu() {
        true => gpu::try_launch(launch, inputs, outputs, workspace),
        false => sim::try_launch(launch, inputs, outputs, workspace),
    };
    result.unwrap_or_else(|error| panic!("{launch:?}: {error}"))
}
