//! `kernels/loss.cu`

use super::MseLoss;
use crate::device::cuda::{Argument, Launch, Precision};
use crate::ops::q_sample::TrainingBatch;

/// Threads of a block, which have four pixels each.
const THREADS: usize = 128;

/// Partial sums of an image, f64: the workspace has as many for each.
pub fn partials(batch: &TrainingBatch) -> usize {
    (batch.height * batch.width).div_ceil(4 * THREADS)
}

/// The gradient and partial sums, then the losses. The network's output and its gradient have `padded` channels.
pub fn launches(op: &MseLoss, precision: Precision, padded: usize) -> [Launch; 2] {
    let &TrainingBatch { images, height, width, channels, flip, seed, held, .. } = &op.batch;
    let numbers = held.map_or(Argument::Null, |_| Argument::Input(5));
    let image = Argument::struct_of([height, width, channels, padded]);
    let partials = partials(&op.batch);
    let first = vec![
        Argument::Input(0),
        Argument::Input(1),
        numbers,
        Argument::Input(2),
        Argument::Input(3),
        Argument::Input(4),
        Argument::Output(0),
        Argument::Scratch,
        Argument::u64(seed),
        image.clone(),
        Argument::f32(op.scale()),
        Argument::flag(flip),
    ];
    let second = vec![Argument::Scratch, Argument::Output(0), Argument::Output(1), Argument::u32(partials), image];
    [
        Launch::new("mse_loss", precision, [partials, images, 1], THREADS, first),
        Launch::new("mse_loss_total", precision, [images, 1, 1], THREADS, second),
    ]
}

/// Sum and number of the losses whose t lies in each quarter of 0 … T−1, f64 `[4, 2]`. Inputs: the losses of `images` images, and their t.
pub fn quartiles(images: usize, timesteps: usize) -> Launch {
    let buffers = [Argument::Input(0), Argument::Input(1), Argument::Output(0)];
    let arguments = buffers.into_iter().chain([images, timesteps].map(Argument::u32)).collect();
    Launch { kernel: "mse_loss_quartiles".into(), grid: [1; 3], block: [THREADS, 1, 1], shared: 0, arguments }
}
